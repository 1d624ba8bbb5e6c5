"""Fine-tune on a Ray cluster: pip install 'ray[train]' and hf_cifar from a clone, then python ray_train.py.

Ray starts one process for each GPU and connects them; each calls hf_cifar, which trains as under torchrun.
The output folder is on storage that all machines share. Compiled in a test here, not run.
"""

import ray.train
from ray.train.torch import TorchTrainer

OUTPUT = "/shared/outputs/vit"


def finetune(options: dict) -> None:
    """Run in each process."""
    from hf_cifar import finetune_classifier

    result = finetune_classifier(**options)
    metrics = result.metrics["validation"]
    ray.train.report({"accuracy": metrics["accuracy"], "cross_entropy": metrics["cross_entropy"]})


if __name__ == "__main__":
    trainer = TorchTrainer(
        finetune,
        train_loop_config={
            "dataset": "uoft-cs/cifar10",
            "output_dir": OUTPUT,
            "resume_from_checkpoint": "last",  # after Ray has replaced a lost process
        },
        scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=True),
        run_config=ray.train.RunConfig(
            name="vit",
            storage_path="/shared/ray",
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()
