"""What the tests of data sets share."""

import pytest
from mmengine.runner import Runner


@pytest.fixture
def load_folder():
    """Makes a loader of a folder of images, in two processes, from arguments of its data set."""

    def load(root, **options):
        return Runner.build_dataloader(
            {
                "dataset": {"type": "TimmDataset", "root": str(root), **options},
                "sampler": {"type": "DefaultSampler", "shuffle": False},
                "batch_size": 4,
                "num_workers": 2,
                "collate_fn": {"type": "default_collate"},
                "worker_init_fn": {"type": "torch_worker_seed"},
            },
            seed=0,
        )

    return load
