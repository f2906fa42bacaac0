"""Every config builds, and the message about a misspelt word has the nearest right one."""

import re

import pytest
import torch
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch.utils.data import default_collate

from linsight.backbones import ZOO
from linsight.backbones.initialization import shapes_only
from linsight.tools.config import CONFIGS, ConfigError, find_config, load_config
from linsight.tools.families import family_name
from linsight.tools.run import report_errors

from .conftest import write_images

OURS = sorted(path.stem for path in CONFIGS.glob("[!_]*/*.py") if "in1k" in path.stem)
OURS.append("rala_vit_nano_digits")


def test_the_recipe_of_each_size():
    rates = {"tiny": 0.1, "small": 0.15, "base": 0.4, "large": 0.55}
    for size, rate in rates.items():
        cfg = load_config(f"rala_vit_{size}_300e_in1k")
        assert cfg.model.backbone == {"model_name": f"rala_vit_{size}", "drop_path_rate": rate}
        assert (cfg.default_hooks.ema.decay, cfg.default_hooks.ema.base_batch_size) == (
            0.99996,
            512,
        )
        assert cfg.train_cfg.max_epochs == 300


@pytest.mark.parametrize(
    ("name", "batch", "rate", "first", "epochs"),
    [
        ("care_s2_300e_in1k", 1536, 2.5e-3, 1e-6, 310),
        ("flowformer_19_300e_in1k", 768, 7.5e-4, 1e-6, 300),
        ("ecoformer_pvtv2_b3_30e_in1k", 256, 2.5e-5, 5e-8, 30),
        ("ecoformer_twins_small_30e_in1k", 256, 1.25e-4, 5e-8, 30),
    ],
)
def test_the_rates_of_other_bodies(name, batch, rate, first, epochs):
    cfg = load_config(name)
    assert cfg.auto_scale_lr.base_batch_size == batch
    assert cfg.optim_wrapper.optimizer.lr == rate
    warm_up, cosine = cfg.param_scheduler
    assert warm_up.start_factor * rate == pytest.approx(first, rel=1e-4)
    assert (cosine.begin, cosine.end - cosine.begin) == (warm_up.end, cosine.T_max)
    assert cfg.train_cfg.max_epochs == epochs


def test_the_rates_of_soft():
    rates = {"soft_vit_tiny": 1e-3, "soft_vit_large": 3.3e-4, "soft_norm_vit_medium": 4e-4}
    for name, rate in rates.items():
        cfg = load_config(f"{name}_300e_in1k")
        assert cfg.model.backbone == {"model_name": name, "drop_path_rate": 0.1}
        adamw = {"opt": "adamw", "fused": True}
        assert cfg.optim_wrapper.optimizer == {**adamw, "lr": rate, "weight_decay": 0.05}
        assert cfg.optim_wrapper.clip_grad.max_norm == 1.0
        assert cfg.train_dataloader.sampler == {"type": "DefaultSampler", "shuffle": True}
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            assert loader.dataset.transform.crop_pct == 0.9


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("name", OURS)
def test_builds(name, images):
    cfg = load_config(name)
    cfg.model.backbone.pop("pretrained", None)
    if not re.search("medium|base|large|huge|b[2-5]", name):
        with shapes_only():
            assert MODELS.build(cfg.model).num_classes == cfg.model.num_classes
    for hook in cfg.default_hooks.values():
        assert HOOKS.build(hook)
    METRICS.build(cfg.val_evaluator)
    if cfg.train_dataloader.dataset.type == "TimmDataset":
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.root = str(images)
            image, _ = DATASETS.build(loader.dataset)[0]
            size = loader.dataset.transform.input_size
            assert getattr(image, "pixels", image).shape == (3, size, size)
        # A recipe for another size says so in its name, as weights of another size in their tag.
        named = re.search(r"in1k_(\d+)$", name)
        assert size == (int(named[1]) if named else 224)


def test_each_family_has_a_recipe():
    """But those whose authors published none that starts from ImageNet-1K alone."""
    recipes = [name.partition("_in1k")[0].rpartition("_")[0] for name in OURS]
    others = {"slab_pvtv2", "softmax_dinov2", "softmax_dinov3", "softmax_twins"}
    # The distilled models of DeiT are a family of their own, which needs a teacher.
    others |= {f"softmax_deit_{size}" for size in ("tiny", "small", "base")}
    assert set(map(family_name, ZOO)) - set(map(family_name, recipes)) == others


def test_a_name_is_in_one_folder():
    names = [path.stem for path in CONFIGS.glob("[!_]*/*.py")]
    assert len(names) == len(set(names))


def test_found_by_name_and_by_path(tmp_path, monkeypatch):
    path = find_config("rala_vit_nano_digits")
    assert find_config("rala_vit_nano_digits.py") == path
    assert find_config(path) == path
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the nearest are rala_vit_nano_digits"):
        find_config("rala_vit_nano_digit")
    with pytest.raises(ConfigError, match="neither a file"):
        find_config("elsewhere/rala_vit_nano_digits.py")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0,1],[2,3]", [[0, 1], [2, 3]]),
        ("(1,2),(3,4)", [(1, 2), (3, 4)]),
        ("[(1,2),[a,b]]", [(1, 2), ["a", "b"]]),
        ("{0: 0, 255: 1}", {0: 0, 255: 1}),
        ("my photos (2)", "my photos (2)"),
        ('"my photos (a, b)"', "my photos (a, b)"),
        ("1,2", [1, 2]),
        ("a", "a"),
    ],
)
def test_values_of_overrides(text, value):
    cfg = load_config("rala_vit_nano_digits", [f"work_dir={text}"])
    assert cfg.work_dir == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_clases=3", "model.num_clases: ImageClassifier takes no .*num_classes"),
        ("model.type=ImageClasifier", "model.type: nothing is registered .*ImageClassifier"),
        ("model.backbone.model_name=rala_vit_tiy", "timm has no model .*rala_vit_tiny"),
        ("model.mixup.mixup_alpa=1", "Mixup takes no .*mixup_alpha"),
        ("train_dataloader.batch_sze=3", "train_dataloader.batch_sze: .*batch_size"),
        ("train_dataloader.sampler.type=DefaltSampler", "DefaultSampler"),
        ("train_dataloader.dataset.transform.hflp=1", "create_transform takes no .*hflip"),
        ("train_cfg.max_epoch=3", "EpochBasedTrainLoop takes no .*max_epochs"),
        ("param_scheduler.0.strt=1", "param_scheduler.0.strt: LinearLR takes no .*start_factor"),
        ("param_scheduler.7.end=1", "Index 7"),
        ("default_hooks.logger.intervall=3", "LoggerHook takes no .*interval"),
        ("optim_wrapper.optimizer.weigth_decay=1", "takes no .*weight_decay"),
        ("optim_wrapper.optimizer.opt=adamv", "timm has no optimizer 'adamv'.*adam"),
        ("optm_wrapper.lr=1", "the config has no such key; the nearest are optim_wrapper"),
        ("unheard=1", "unheard: the config has no such key"),
        ("train_cfg", "key=value, got 'train_cfg'"),
        ("work_dir=dict(a=1,b=2)", r"a list is \[a, b\], .* one work_dir\.NAME=VALUE per entry"),
        ("work_dir=photos(a,b)", r"a list is \[a, b\], .* in double quotes"),
        ("train_cfg=[1,2", r"a list is \[a, b\]"),
        ("train_cfg=lambda x: (x, 1)", r"a list is \[a, b\]"),
        ("train_cfg={a: 1, b", r"a dict \{'a': 1, 'b': 2\}"),
    ],
)
def test_misspelt_override(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("rala_vit_nano_digits", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_dataloader.batch_size=0", "batch_size is 0, expected a whole number of at least 1"),
        ("train_dataloader.batch_size=many", "batch_size is 'many', expected a whole number"),
        ("train_dataloader.batch_size=3.5", r"batch_size is 3\.5, expected a whole number"),
        ("train_dataloader.batch_size=True", "batch_size is True, expected a whole number"),
        ("train_dataloader.dataset.length=x", "length is 'x', expected a whole number"),
        ("train_dataloader.dataset.length={}", "dataset.length: .* length is a dict"),
        ("train_dataloader.num_workers=(1,2)", r"num_workers is \(1, 2\), expected a whole"),
        ("train_dataloader.dataset.transform.input_size=[]", r"input_size is \[\], expected"),
        ("randomness.seed=0.5", "seed is 0.5, expected a whole number"),
        ("val_dataloader.num_workers=-1", "num_workers is -1, expected a whole number"),
        ("train_cfg.max_epochs=-1", "train_cfg.max_epochs is -1"),
        ("train_cfg.val_interval=0", "train_cfg.val_interval is 0"),
        ("model.num_classes=0", "model.num_classes is 0"),
        ("model.label_smoothing=2", "label_smoothing is 2, expected .* at most 1"),
        ("model.backbone.drop_path_rate=1.5", "drop_path_rate is 1.5, expected .* at most 1"),
        ("model.mixup.mixup_alpha=-1", "mixup_alpha is -1"),
        ("optim_wrapper.optimizer.lr=-1e-3", r"optimizer\.lr is -0.001"),
        ("optim_wrapper.optimizer.lr=fast", r"optimizer\.lr is 'fast'"),
        ("optim_wrapper.optimizer.weight_decay=-1", "weight_decay is -1"),
        ("train_dataloader.dataset.transform.input_size=0", "input_size is 0"),
        ("train_dataloader.dataset.transform.input_size=(3,64,-64)", r"input_size is \(3, 64, -64"),
    ],
)
def test_a_number_out_of_range(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("rala_vit_nano_digits", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=7", r"model is a dict; set what is in it, as model\.type=VALUE"),
        ("train_dataloader.dataset=7", r"dataset is a dict; .* or leave it out"),
        ("model=None", "model is None, expected a dict"),
        ("log_level=loud", "log_level is 'loud', expected one such as INFO"),
        ("train_dataloader.drop_last=7", "drop_last is 7, expected True or False"),
        ("optim_wrapper.optimizer.opt=7", "opt is 7, expected a name of timm's"),
        ("train_dataloader.sampler.type=7", r"sampler\.type is 7, expected a registered name"),
        ("model.backbone.model_name=7", "model_name is 7, expected a name of timm's"),
        ("default_hooks.mine.interval=7", "default_hooks.mine has no type"),
    ],
)
def test_a_word_or_a_dict_is_none(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("rala_vit_nano_digits", [override])


def test_misspelt_in_the_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f'_base_ = "{find_config("rala_vit_nano_digits")}"\nparam_schedulers = []\n')
    with pytest.raises(ConfigError, match="did you mean 'param_scheduler'"):
        load_config(path)
    path.write_text("model = dict(\n")
    with pytest.raises(ConfigError, match=r"mine\.py"):
        load_config(path)
    path.write_text('_base_ = "nowhere.py"\n')
    with pytest.raises(ConfigError, match=r"nowhere\.py"):
        load_config(path)


def test_overrides_may_add_what_is_a_parameter():
    cfg = load_config(
        "rala_vit_nano_digits",
        [
            "optim_wrapper.optimizer.betas=(0.9,0.95)",
            "optim_wrapper.clip_grad.max_norm=1.0",
            "model.backbone.drop_rate=0.1",
            "param_scheduler.1.end=7",
            "model.mixup.mixup_alpha=0.2",
        ],
    )
    assert cfg.optim_wrapper.optimizer.betas == (0.9, 0.95)
    assert cfg.param_scheduler[1].end == 7
    assert cfg.model.mixup == {"mixup_alpha": 0.2}


@pytest.mark.parametrize(
    ("name", "rate", "batch", "clip", "epochs"),
    [
        ("agent_deit_tiny", 0.0, 4096, 5.0, 300),
        ("agent_deit_small", 0.1, 1024, 5.0, 300),
        ("agent_deit_base", 0.3, 1024, 5.0, 300),
        ("agent_pvt_tiny", 0.1, 1024, None, 310),
        ("agent_pvt_medium", 0.3, 1024, 1.0, 310),
        ("agent_pvt_large", 0.3, 512, 1.0, 310),
        ("flatten_pvt_small", 0.1, 512, None, 310),
        ("flatten_pvt_large", 0.3, 256, 1.0, 310),
        ("flatten_pvtv2_b3", 0.3, 1024, 1.0, 310),
        ("flatten_pvtv2_b4", 0.3, 512, 1.0, 310),
        ("softmax_deit_base", 0.1, 1024, None, 300),
        ("softmax_pvt_large", 0.3, 1024, 1.0, 300),
    ],
)
def test_the_recipes_of_deit_and_pvt(name, rate, batch, clip, epochs):
    cfg = load_config(f"{name}_300e_in1k")
    assert cfg.model.backbone == {"model_name": name, "drop_path_rate": rate}
    assert cfg.auto_scale_lr.base_batch_size == batch == 8 * cfg.train_dataloader.batch_size
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(5e-4 * batch / 512)
    assert (cfg.optim_wrapper.get("clip_grad") or {}).get("max_norm") == clip
    assert cfg.train_cfg.max_epochs == epochs
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.end, cosine.end) == (cosine.begin, 300)
    assert cosine.T_max == cosine.end - cosine.begin
    scaled = name.startswith(("agent", "flatten"))
    assert (cfg.train_dataloader.sampler.type == "DefaultSampler") == scaled
    if scaled:
        # The rates are scaled with the batch, as the authors scale them.
        first, last = (5e-7, 5e-6) if "deit" in name else (1e-6, 1e-5)
        lr = cfg.optim_wrapper.optimizer.lr
        assert warm_up.start_factor * lr == pytest.approx(first * batch / 512)
        assert cosine.eta_min == pytest.approx(last * batch / 512)
        assert cfg.test_dataloader.dataset.transform.crop_mode == "squash"


def test_images_of_two_sizes(capsys):
    sizes = (torch.zeros(3, 4, 6), torch.zeros(3, 6, 4))
    with pytest.raises(SystemExit), report_errors():
        default_collate([(image, image[0]) for image in sizes])
    said = capsys.readouterr().err
    assert said.startswith("error: the images of a batch have the sizes [3, 4, 6] and [3, 6, 4]: ")
    assert "batch_size=1" in said
