"""`hf-cifar demo`."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import Command, require_model
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.serving import DemoConfig
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import RunFolder

logger = logging.getLogger(__name__)
MAX_MODELS = 2


def demo(predict: PredictConfig, config: DemoConfig, arguments: Sequence[str]) -> int:
    """Show a page to try one model or two until a signal ends it, or write and push a Space with it."""
    given = [predict.model_name_or_path] if predict.model_name_or_path else []
    names = [*given, *arguments] or [""]
    if len(names) > MAX_MODELS or len(set(names)) < len(names):
        raise UserError(f"demo takes one model, or two different ones; leave out {names[-1]}")
    models = [dataclasses.replace(predict, model_name_or_path=name) for name in names]
    for model in models:
        require_model(model)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    require("gradio", extra="demo")
    quieten(True)
    return _show(models, config) if config.space is None else _write(models, config)


def _show(models: Sequence[PredictConfig], config: DemoConfig) -> int:
    from hf_cifar.predict import Predictor
    from hf_cifar.serve.demo import serve_demo

    predictors = {
        title: Predictor(model) for title, model in zip(_titles(models), models, strict=True)
    }
    with tempfile.TemporaryDirectory(prefix="hf_cifar-examples-") as scratch:
        serve_demo(predictors, _examples(models, config, Path(scratch, "examples")), config)
    return 0


def _write(models: Sequence[PredictConfig], config: DemoConfig) -> int:
    from hf_cifar.deploy.space import check_space, plan_space, write_space
    from hf_cifar.hub.push import push_planned, render_plan

    assert config.space is not None
    space = Path(config.space)
    check_space(models, space)
    with write_space(dict(zip(_titles(models), models, strict=True)), space) as folder:
        _examples(models, config, folder / "examples")
    print(space)
    if config.push is not None:
        plan = plan_space(space, config.push, config.private)
        print(render_plan(plan), flush=True)
        print(f"pushed to {push_planned(plan)}")
    return 0


def _titles(models: Sequence[PredictConfig]) -> list[str]:
    """Name each model by its folder, file or Hub id; by what was typed if that is the same for both."""
    names = [each.model_name_or_path for each in models]
    titles = [Path(name).resolve().name if Path(name).exists() else name for name in names]
    return titles if len(set(titles)) == len(titles) else names


def _examples(models: Sequence[PredictConfig], config: DemoConfig, folder: Path) -> list[Path]:
    """Write examples from the validation split of the first run, and say how many or why there are none."""
    from hf_cifar.deploy.examples import write_examples

    if not config.num_examples:
        return []
    runs = [RunFolder(each.model_name_or_path) for each in models]
    run = next((each for each in runs if each.has_run), None)
    if run is None:
        logger.info("no examples: no model is a run, which has a validation split")
        return []
    try:
        files = write_examples(run, folder, config.num_examples, config.dataset_name)
    except UserError as error:
        if config.dataset_name is not None:
            raise
        logger.warning("no examples: %s", error)
        return []
    logger.info("%d examples from the validation split of %s", len(files), run.path)
    return files


COMMAND = Command(
    "show a page to try one model or two side by side, or make a Space of it", demo,
    (PredictConfig, DemoConfig), "RUN [OTHER_RUN]",
)  # fmt: skip
