import pytest
import timm
import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.training_args import OptimizerNames

from hf_cifar.errors import UserError
from hf_cifar.models.blocks import freeze
from hf_cifar.training.optimizers import (
    COUPLED_DECAY,
    OPTIMIZER_FAMILIES,
    OPTIMIZERS,
    RATES,
    build_optimizer,
    decay_learning_rates,
    decay_parameter_names,
    default_rate,
    default_weight_decay,
    model_family,
    parameter_groups,
    parse_arguments,
)
from hf_cifar.training.schedules import build_schedule


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=32, patch_size=8,
        )
    )  # fmt: skip


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def swin():
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1],
                   window_size=4, use_absolute_embeddings=True)
    )  # fmt: skip


MODELS = {
    "vit": vit,
    "resnet": resnet,
    "swin": swin,
    "timm vit": lambda: timm.create_model("test_vit", num_classes=3),
    "timm vit, registers": lambda: timm.create_model("test_vit", num_classes=3, reg_tokens=2),
    "timm resnet": lambda: timm.create_model("test_resnet", num_classes=3),
    "timm swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1),
        num_heads=(1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_only_weights_of_layers_decay(name):
    model = MODELS[name]()
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    expected = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, layers)
    }
    found = decay_parameter_names(model)
    assert set(found) == expected
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("vit", ["vit.embeddings.position_embeddings", "vit.embeddings.cls_token"]),
        ("timm vit", ["pos_embed", "cls_token"]),
        ("timm vit, registers", ["reg_token"]),
        ("swin", ["swin.embeddings.position_embeddings", "relative_position_bias_table"]),
        ("timm swin", ["relative_position_bias_table"]),
    ],
)
def test_embeddings_and_tokens_do_not_decay(name, spared):
    model = MODELS[name]()
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    for part in spared:
        assert any(n.endswith(part) for n in names), part
        assert not any(n.endswith(part) for n in decay_parameter_names(model))


def test_parameters_that_a_model_exempts_do_not_decay():
    class Declared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2, 2))
            self.layer = torch.nn.Linear(2, 2)

        def no_weight_decay(self):
            return {"scale"}

    assert decay_parameter_names(torch.nn.Sequential(Declared())) == ["0.layer.weight"]


def test_learning_rate_scales_with_the_root_of_the_batch():
    model = vit()
    rates = [default_rate(model, batch) for batch in (16, 64, 256)]
    assert rates[1] / rates[0] == pytest.approx(2, rel=1e-2)
    assert rates[2] / rates[1] == pytest.approx(2, rel=1e-2)


def test_rates_by_family():
    transformer, network = vit(), resnet()
    pretrained = default_rate(transformer, 64)
    assert 0 < pretrained < default_rate(network, 64)
    for model in (transformer, network):
        assert default_rate(model, 64, scratch=True) == 2.5e-3
    assert [model_family(model) for model in (transformer, network)] == ["attention", "convolution"]
    freeze(transformer, "backbone")
    assert model_family(transformer, scratch=True) == "head"
    head = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    assert head < 0.05 * sum(p.numel() for p in transformer.parameters())
    assert default_rate(transformer, 64) > pretrained


def test_the_rate_of_sgd_scales_with_the_batch_and_one_minus_momentum():
    model = vit()
    freeze(model, "backbone")

    def rate(batch, optim_args=None):
        return default_rate(model, batch, optim="sgd", optim_args=optim_args)

    assert rate(64) == RATES["sgd"]["head"]
    assert rate(256) == pytest.approx(4 * rate(64), rel=1e-2)
    assert rate(64, "nesterov=true,momentum=0.9") == pytest.approx(0.1 * rate(64), rel=1e-2)
    assert rate(64, "momentum = 0.9") == rate(64, "momentum=0.9")
    for wrong in ("momentum=fast", "momentum=1"):
        with pytest.raises(UserError, match="momentum must be a number from 0 to below 1"):
            rate(64, wrong)


def test_an_optimiser_or_a_family_without_a_known_rate_has_none():
    assert default_rate(resnet(), 64, optim="rmsprop") is None
    assert default_rate(vit(), 64, optim="lamb") is None
    assert RATES["sgd"].keys() < RATES["adamw"].keys()


def test_every_optimiser_with_a_rate_exists():
    assert OPTIMIZER_FAMILIES.keys() <= OPTIMIZERS.keys()
    assert OPTIMIZERS.keys() >= COUPLED_DECAY
    assert set(OPTIMIZER_FAMILIES.values()) == RATES.keys()


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
)
def test_every_optimiser_that_needs_no_package_is_built(tmp_path, name):
    """With the Trainer's hyperparameters, and our parameter groups."""
    model = vit()
    args = TrainingArguments(output_dir=tmp_path, optim=name, learning_rate=0.1, use_cpu=True)
    args.layer_decay = 1.0
    optimizer = build_optimizer(model, args)
    stock = Trainer(model=model, args=args).create_optimizer()
    assert type(optimizer) is type(stock)
    decayed, plain = optimizer.param_groups
    assert {id(p) for p in decayed["params"]} == {
        id(p) for p in parameter_groups(model, 0.0)[0]["params"]
    }
    options = [
        {k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (optimizer, stock)
    ]
    assert options[0] == options[1]
    assert plain["weight_decay"] == 0


def test_rates_decay_with_depth_and_keep_the_groups_options():
    layers = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    depths = {p: 2 - int(name[0]) for name, p in layers.named_parameters()}
    weights = [p for p in layers.parameters() if p.ndim > 1]
    biases = [p for p in layers.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=0.4
    )
    decay_learning_rates(optimizer, depths, 0.5)
    found = {
        p: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        p: (0.4 * 0.5**depth, 0.1 if p.ndim > 1 else 0.0) for p, depth in depths.items()
    }
    assert optimizer.param_groups[0]["lr"] == 0.4  # the rate that the Trainer reports


TIMM = [name for name in OPTIMIZERS if name not in tuple(OptimizerNames)]


@pytest.mark.parametrize("name", TIMM)
def test_every_optimiser_of_timm_takes_the_step_of_timm(tmp_path, name):
    ours, theirs = vit(), vit()
    theirs.load_state_dict(ours.state_dict())
    args = TrainingArguments(
        output_dir=tmp_path, learning_rate=0.01, weight_decay=0.1, use_cpu=True
    )
    args.optim = name
    momentum = 0.95 if "muon" in name else 0.9
    reference = timm.optim.create_optimizer_v2(
        parameter_groups(theirs, 0.1), name, lr=0.01, weight_decay=0.1, momentum=momentum
    )
    for model, optimizer in ((ours, build_optimizer(ours, args)), (theirs, reference)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        torch.manual_seed(0)
        for _ in range(2):
            optimizer.zero_grad()
            pixel_values = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
            model(pixel_values).logits.square().sum().backward()
            torch.manual_seed(1)
            optimizer.step()
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


def test_the_articles_step_of_adam(tmp_path):
    """g = 0.2, m = 0.1, v = 0.3: m becomes 0.11 and v 0.29974."""
    weight = torch.nn.Linear(1, 1, bias=False)
    args = TrainingArguments(output_dir=tmp_path, learning_rate=0.1, use_cpu=True)
    args.optim = "adam"
    optimizer = build_optimizer(weight, args)
    state = {"step": torch.tensor(1.0), "exp_avg": torch.tensor([[0.1]])}
    optimizer.state[weight.weight] = state | {"exp_avg_sq": torch.tensor([[0.3]])}
    weight.weight.grad = torch.tensor([[0.2]])
    optimizer.step()
    state = optimizer.state[weight.weight]
    assert state["exp_avg"].item() == pytest.approx(0.11)
    assert state["exp_avg_sq"].item() == pytest.approx(0.29974)


def shrinking(name, tmp_path):
    """Return how far 20 steps on tiny gradients move a weight of 1 by its decay, in units of rate x decay."""
    weights = []
    for decay in (0.1, 0.0):
        layer = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.ones_(layer.weight)
        args = TrainingArguments(tmp_path, learning_rate=1e-3, weight_decay=decay, use_cpu=True)
        args.optim = name
        optimizer = build_optimizer(layer, args)
        for step in range(20):
            torch.manual_seed(step)
            layer.weight.grad = 1e-6 * torch.randn(4, 4)
            optimizer.step()
        weights.append(layer.weight.mean().item())
    return (weights[1] - weights[0]) / 20 / 1e-4


@pytest.mark.parametrize(
    "name", ["adamw_torch", "lion", "muon", "nadamw", "adanw", "radamw", "adamuon", "mars"]
)
def test_decoupled_decay_takes_rate_times_decay_off_each_weight(name, tmp_path):
    assert name not in COUPLED_DECAY
    assert shrinking(name, tmp_path) == pytest.approx(1, abs=0.01)
    assert default_weight_decay(name) == 0.05


@pytest.mark.parametrize("name", ["adam", "nadam", "adamax", "rmsprop", "momentum", "novograd"])
def test_coupled_decay_outweighs_small_gradients(name, tmp_path):
    assert name in COUPLED_DECAY
    assert shrinking(name, tmp_path) > 4
    assert default_weight_decay(name) == 0.0005


def test_arguments_of_optimisers_are_parsed_and_checked(tmp_path):
    assert parse_arguments("momentum=0.9, nesterov=true,betas=(0.9,0.95),mode=flat") == {
        "momentum": 0.9, "nesterov": True, "betas": (0.9, 0.95), "mode": "flat",
    }  # fmt: skip
    args = TrainingArguments(output_dir=tmp_path, learning_rate=0.1, use_cpu=True, adam_beta2=0.95)
    args.optim, args.optim_args = "lion", "caution=true"
    assert build_optimizer(vit(), args).defaults["betas"] == (0.9, 0.95)
    assert build_optimizer(vit(), args).defaults["caution"] is True
    args.optim = "momentum"
    with pytest.raises(ValueError, match="does not have two betas"):
        build_optimizer(vit(), args)
    args.optim, args.optim_args = "lion", "momentum=0.5"
    with pytest.raises(ValueError, match="does not take momentum"):
        build_optimizer(vit(), args)
    args = TrainingArguments(output_dir=tmp_path, learning_rate=0.1, use_cpu=True)
    for args.optim, args.optim_args in (("sgd", "momentun=0.9"), ("adamw_torch", "momentum=0.9")):
        with pytest.raises(ValueError, match="does not take momentu"):
            build_optimizer(vit(), args)
    args.optim, args.optim_args = "sgd", "momentum=0.9,nesterov=true"
    assert build_optimizer(vit(), args).defaults["nesterov"] is True


def test_l1_decay_moves_weights_towards_zero(tmp_path):
    layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.5, 0.001]]))
        layer.bias.fill_(0.5)
    args = TrainingArguments(output_dir=tmp_path, learning_rate=0.1, weight_decay=0.0, use_cpu=True)
    args.optim = "sgd"
    optimizer = build_optimizer(layer, args, l1_decay=0.2)
    layer.weight.grad, layer.bias.grad = torch.tensor([[1.0, 0, 0]]), torch.zeros(1)
    optimizer.step()
    assert layer.weight.tolist()[0] == pytest.approx([0.5 - 0.1 - 0.02, -0.48, 0.0])
    assert layer.weight[0, 2] == 0
    assert layer.bias.item() == 0.5


def rates_by_name(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_the_backbone_has_a_rate_of_its_own(layer_decay, tmp_path):
    """Layer-wise decay starts from it, and the rate that the Trainer logs is the head's."""
    model = vit()
    args = TrainingArguments(tmp_path, learning_rate=0.1, optim="sgd", weight_decay=0.1)
    optimizer = build_optimizer(model, args, layer_decay, backbone_learning_rate=0.01)
    depths = {"classifier": None, "vit.layernorm": 0, "vit.layers.1.": 1, "vit.layers.0.": 2}
    depths["vit.embeddings"] = 3
    rates = rates_by_name(model, optimizer)
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, rate in rates.items():
        depth = next(d for prefix, d in depths.items() if name.startswith(prefix))
        assert rate == (0.1 if depth is None else 0.01 * layer_decay**depth), name
    first = optimizer.param_groups[0]
    assert first["params"] == [model.classifier.weight]
    assert (first["lr"], first["weight_decay"]) == (0.1, 0.1)
    decaying = {p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decaying == set(parameter_groups(model, 0.1)[0]["params"])


@pytest.mark.parametrize("name", ["linear", "one_cycle", "step", "reduce_lr_on_plateau"])
def test_a_schedule_scales_both_rates(name, tmp_path):
    model = vit()
    args = TrainingArguments(tmp_path, learning_rate=0.1, optim="sgd", warmup_steps=3)
    args.lr_scheduler_type = name
    args.lr_scheduler_kwargs = {"patience": 2} if name == "reduce_lr_on_plateau" else None
    optimizer = build_optimizer(model, args, backbone_learning_rate=0.01)
    schedule, heads = build_schedule(args, optimizer, 12), set()
    for step in range(12):
        optimizer.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        heads.add(round(rates[0], 6))
        assert rates == pytest.approx([rates[0]] * 2 + [rates[0] / 10] * 2), step
        schedule.step(*([1.0] if name == "reduce_lr_on_plateau" else []))
    assert len(heads) > 3


def test_l1_decay_leaves_frozen_weights_alone(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    args = TrainingArguments(tmp_path, learning_rate=0.5, optim="sgd", weight_decay=0)
    optimizer = build_optimizer(layers, args, l1_decay=0.2)
    before = [layer.weight.detach().clone() for layer in layers]
    layers[0].requires_grad_(False)
    optimizer.step()
    assert torch.equal(layers[0].weight, before[0])
    assert torch.allclose(layers[1].weight, torch.nn.functional.softshrink(before[1], 0.1))


@pytest.mark.parametrize(
    "name", sorted(OPTIMIZERS.keys() - {each.value for each in OptimizerNames})
)
def test_every_optimiser_of_timm_takes_weights_that_train_later(name, tmp_path):
    """A parameter without a gradient neither moves nor decays, and trains once it has one."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
    args = TrainingArguments(tmp_path, learning_rate=0.01, weight_decay=0.1)
    args.optim = name
    optimizer, before = build_optimizer(layers, args), layers[0].weight.detach().clone()
    layers[0].requires_grad_(False)
    for step in range(6):
        if step == 3:
            assert torch.equal(layers[0].weight, before)
            layers[0].requires_grad_(True)
        layers(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        layers.zero_grad()
    assert not torch.equal(layers[0].weight, before)
