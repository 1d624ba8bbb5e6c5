"""The articles' two networks, as transformers models: a small CNN and a three-layer network.

Importing this module registers them, so that `from_pretrained` and `pipeline` load such a model. A copy of
this file is saved with each model, so that `trust_remote_code=True` works without hf_cifar; it imports
nothing from the package.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class ArticleConfig(PreTrainedConfig):
    """Options of both networks. image_size: side of the input, in pixels."""

    model_type = "article_cnn"

    def __init__(
        self, image_size: int = 32, num_channels: int = 3, hidden_size: int = 64, **kwargs
    ):
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


# transformers generates an `__init__` for a configuration class that has none, and it would not call the one
# above.
class ArticleCNNConfig(ArticleConfig):
    """The small CNN."""

    model_type = "article_cnn"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class ArticleMLPConfig(ArticleConfig):
    """The three-layer network."""

    model_type = "article_mlp"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class ArticleModel(PreTrainedModel):
    """A backbone and one linear head. Weights are initialised as in Keras: Glorot uniform, zero biases."""

    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    # The loss is a plain mean: the Trainer must scale it under gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: ArticleConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self._build_backbone(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _build_backbone(self, config: ArticleConfig) -> nn.Module:
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """Compute logits [N, K] of pixel_values [N, C, S, S] and, with labels [N], the mean cross-entropy."""
        logits = self.head(self.backbone(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class ArticleCNNForImageClassification(ArticleModel):
    """conv 32, pool, conv 64, pool, conv 64, dense 64, dense K: 122,570 parameters at 32 px, K = 10."""

    config_class = ArticleCNNConfig

    def _build_backbone(self, config: ArticleConfig) -> nn.Module:
        side = ((config.image_size - 2) // 2 - 2) // 2 - 2
        if side < 1:
            raise ValueError(f"article_cnn needs images of at least 18 px, not {config.image_size}")
        return nn.Sequential(
            nn.Conv2d(config.num_channels, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * side * side, config.hidden_size), nn.ReLU(),
        )  # fmt: skip


class ArticleMLPForImageClassification(ArticleModel):
    """image -> 64 hidden units -> K classes."""

    config_class = ArticleMLPConfig

    def _build_backbone(self, config: ArticleConfig) -> nn.Module:
        inputs = config.num_channels * config.image_size**2
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, config.hidden_size), nn.ReLU())


for _config, _model in (
    (ArticleCNNConfig, ArticleCNNForImageClassification),
    (ArticleMLPConfig, ArticleMLPForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForImageClassification")
