"""`linsight train` and `linsight test`, on a training of seconds."""

import shutil
from importlib.util import find_spec

import pytest
import safetensors.torch
import torch
import typer
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from PIL import Image
from typer.testing import CliRunner

from linsight.backbones.checkpoint import CheckpointError
from linsight.tools.model import find_checkpoint, read_run
from linsight.tools.test import test as run_test
from linsight.tools.train import train

from .conftest import full_disk, write_config, write_images


def command(function):
    app = typer.Typer()
    app.command()(function)

    def call(*arguments, expect=0):
        # mmengine names its loggers by the second, and finds them again.
        for shared in (MMLogger, MessageHub, Visualizer):
            shared._instance_dict.clear()
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exit_code != expect:
            raise AssertionError(result.output) from result.exception
        assert "Traceback" not in result.output
        return result.output

    return call


cli_train, cli_test = command(train), command(run_test)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training: its config and its work dir."""
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder / "images")
    (folder / "images" / "train" / "class_1" / "2.png").write_bytes(b"no image")
    config = write_config(folder, workers=1)
    output = cli_train(config, "--work-dir", folder / "run", "--tensorboard")
    (folder / "output.txt").write_text(output)
    return config, folder / "run"


class TestTrain:
    def test_leaves_weights_figures_and_logs(self, trained):
        _, work_dir = trained
        # Of three checkpoints, the last and the best are kept.
        assert {p.name for p in work_dir.glob("epoch_*")} == {"epoch_3.pth"}
        assert len(list(work_dir.glob("best_accuracy_top1_epoch_*.pth"))) == 1
        assert (work_dir / "last_checkpoint").read_text() == str(work_dir / "epoch_3.pth")
        for figure in ("learning_curve.png", "predictions.png"):
            with Image.open(work_dir / figure) as picture:
                assert min(picture.size) > 300
        assert list(work_dir.glob("*/vis_data/events.out.tfevents*"))

    def test_says_what_concerns_the_user(self, trained):
        output = (trained[1].parent / "output.txt").read_text()
        assert "Epoch(train) [1][3/3]" in output
        assert "accuracy/top1" in output
        assert "The training has done" not in output
        assert "1 of 12 images could not be read: class_1/2.png" in output
        assert "System environment" not in output
        assert "deprecated" not in output
        (best,) = trained[1].glob("best_*.pth")
        assert f"Weights: {best}" in output
        # The log file has all of it.
        (log,) = trained[1].glob("*/*.log")
        assert "System environment" in log.read_text()

    def test_misses_the_data_before_it_fetches_weights(self, monkeypatch):
        """The data is missed first, also by segmentors and detectors, which fetch weights early."""
        monkeypatch.setattr("timm.create_model", None)
        output = cli_train("upernet_rala_vit_small_160k_ade20k", expect=1)
        assert (
            "error: the folder data_root 'data/ade/ADEChallengeData2016' does not exist" in output
        )

    def test_checkpoint_is_safe_to_load(self, trained):
        best = next(trained[1].glob("best*"))
        content = torch.load(trained[1] / "epoch_3.pth", weights_only=False)
        assert content["meta"]["dataset_meta"]["classes"] == ["class_0", "class_1", "class_2"]
        assert content["meta"]["epoch"] == 3
        assert content["ema_state_dict"]["steps"] == 9
        assert best.stat().st_size > 1000

    def test_fine_tunes_other_classes_from_it(self, trained, tmp_path):
        write_images(tmp_path / "images", classes=4, images=2)
        config = write_config(tmp_path)
        output = cli_train(
            config,
            "--work-dir",
            tmp_path / "run",
            "--cfg-options",
            "model.num_classes=4",
            "train_cfg.max_epochs=1",
            "model.compile.backend=eager",
            f"load_from={trained[1] / 'epoch_3.pth'}",
            "default_hooks.learning_curve=None",
            "default_hooks.predictions=None",
        )
        assert "was trained for 3 classes, and the config has 4" in output
        assert not (tmp_path / "run" / "predictions.png").exists()

    def test_resumes_from_a_named_file(self, trained, tmp_path):
        output = cli_train(
            trained[0],
            "--work-dir",
            tmp_path,
            "--resume",
            trained[1] / "epoch_3.pth",
            "--cfg-options",
            "default_hooks.learning_curve=None",
            "default_hooks.predictions=None",
        )
        assert "resumed epoch: 3" in output
        assert "The training has done its 3 epochs" in output

    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_learns_from_a_teacher(self, trained, tmp_path, kind):
        best = next(trained[1].glob("best*"))
        words = ["train_cfg.max_epochs=1", f"model.distillation.kind={kind}"]
        words += ["default_hooks.learning_curve=None", "default_hooks.predictions=None"]
        cli_train(trained[0], "--teacher", best, "--work-dir", tmp_path, *words)
        config = (tmp_path / "tiny.py").read_text()
        assert f"kind='{kind}'" in config
        assert f"local-dir:{tmp_path}/teacher" in config
        teacher = safetensors.torch.load_file(tmp_path / "teacher" / "model.safetensors")
        wanted = torch.load(best, weights_only=False)["state_dict"]
        assert all(torch.equal(teacher[k.removeprefix("backbone.")], wanted[k]) for k in wanted)
        # The teacher's weights are not learnt, and not written.
        student = torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]
        assert student.keys() == wanted.keys()

    @pytest.mark.parametrize(
        ("teacher", "words", "message"),
        [
            ("rala_vit_nanno", [], "'rala_vit_nanno' is neither a file nor a model of timm; the n"),
            (None, ["model.num_classes=4"], "the teacher has 3 classes and the model 4: take"),
        ],
    )
    def test_a_wrong_teacher_is_named(self, trained, tmp_path, teacher, words, message):
        teacher = teacher or next(trained[1].glob("best*"))
        words = ["--work-dir", tmp_path, *words]
        output = cli_train(trained[0], "--teacher", teacher, *words, expect=1)
        assert f"error: {message}" in output

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["model.num_classes=5"], "has 3 classes, and model.num_classes is 5"),
            (["train_dataloader.dataset.root=nowhere"], "'nowhere' does not exist"),
            (["model.num_clases=5"], "num_classes"),
            (["load_from=nowhere.pth"], "nowhere.pth does not exist"),
            (["train_dataloader.batch_size=13"], "12 images, too few for a batch: set"),
            (
                [
                    "train_dataloader.sampler={'_delete_': True, 'type': 'RepeatAugSampler', "
                    "'selected_ratio': 10}"
                ],
                "12 images, of which the sampler draws",
            ),
            (
                [
                    "model.backbone.model_name=rala_vit_nano",
                    "train_dataloader.dataset.transform.input_size=16",
                ],
                "images are 16 x 16 pixels, at least 32 x 32 are needed",
            ),
        ],
    )
    def test_faults_are_one_line(self, tiny, words, message):
        output = cli_train(tiny, "--work-dir", tiny.parent, "--cfg-options", *words, expect=1)
        last = output.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert message in last

    def test_a_diverged_training_writes_no_checkpoint(self, tiny):
        run = tiny.parent / "run"
        output = cli_train(tiny, "--work-dir", run, "optim_wrapper.optimizer.lr=1e30", expect=1)
        assert "error: the training has diverged: " in output
        assert "lower optim_wrapper.optimizer.lr" in output
        assert not list(run.glob("*.pth"))

    def test_a_full_disk_costs_no_checkpoint(self, tiny):
        run = tiny.parent / "run"
        words = ["--work-dir", run, "default_hooks.predictions=None"]
        cli_train(tiny, *words, "train_cfg.max_epochs=1")
        first = (run / "epoch_1.pth").read_bytes()
        with full_disk(len(first) // 2):
            output = cli_train(tiny, *words, "--resume", expect=1)
        assert "epoch_2.pth: File too large; what was there before is untouched" in output
        assert (run / "epoch_1.pth").read_bytes() == first
        assert {p.name for p in run.glob("epoch_*")} == {"epoch_1.pth"}
        assert "resumed epoch: 1" in cli_train(tiny, *words, "--resume")
        assert (run / "epoch_3.pth").is_file()
        (run / "epoch_3.pth").write_bytes(first[:3000])
        output = cli_train(tiny, *words, "--resume", expect=1)
        assert "epoch_3.pth is truncated or damaged (3000 bytes)" in output

    def test_too_many_corrupt_images_in_a_worker(self, tmp_path):
        write_images(tmp_path / "images")
        for picture in (tmp_path / "images" / "train" / "class_0").iterdir():
            picture.write_bytes(b"no image")
        config = write_config(tmp_path, workers=1)
        output = cli_train(config, "--work-dir", tmp_path / "run", expect=1)
        last = output.strip().splitlines()[-1]
        assert last.startswith("error: 2 of 12 images could not be read: class_0/")

    @pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed")
    def test_a_tracker_that_is_not_installed(self, tiny):
        output = cli_train(tiny, "--work-dir", tiny.parent / "run", "--tracker", "mlflow", expect=1)
        assert "error: --tracker mlflow needs its package: pip install mlflow" in output

    def test_a_work_dir_that_cannot_be_written(self, tiny):
        (tiny.parent / "file").write_text("")
        run = tiny.parent / "file" / "run"
        output = cli_train(tiny, "--work-dir", run, expect=1)
        assert output.strip().splitlines()[-1].startswith("error: ")
        words = (tiny, "nowhere.pth", "--work-dir", run)
        assert f"error: {run}: Not a directory" in cli_test(*words, expect=1).replace("\n", "")


class TestTest:
    def test_mmengines_and_safetensors_give_the_same(self, trained, tmp_path):
        config, work_dir = trained
        output = cli_test(config, work_dir / "epoch_3.pth", "--work-dir", tmp_path)
        (line,) = [line for line in output.splitlines() if line.startswith("│ top1")]
        state = torch.load(work_dir / "epoch_3.pth", weights_only=False)["state_dict"]
        state = {k.removeprefix("backbone."): v.contiguous() for k, v in state.items()}
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        again = cli_test(config, tmp_path / "model.safetensors", "--work-dir", tmp_path)
        assert line in again.splitlines()
        assert (tmp_path / "predictions.png").is_file()

    def test_two_checkpoints(self, trained):
        """As the pattern best_*.pth gives them where two trainings had one work dir."""
        _, work_dir = trained
        output = cli_test(next(work_dir.glob("best_*")), work_dir / "epoch_3.pth", expect=1)
        assert "are two checkpoints: name one of them" in output.replace("\n", " ")

    def test_a_work_dir_stands_for_its_best_checkpoint(self, trained, tmp_path):
        work_dir = tmp_path / "run"
        shutil.copytree(trained[1], work_dir)
        (best,) = work_dir.glob("best_*.pth")
        assert find_checkpoint(work_dir) == best
        assert read_run(work_dir).classes == ("class_0", "class_1", "class_2")
        best.rename(work_dir / "second.pth")
        assert find_checkpoint(work_dir) == work_dir / "epoch_3.pth"
        for name in ("best_a.pth", "best_b.pth"):
            shutil.copy(work_dir / "second.pth", work_dir / name)
        with pytest.raises(CheckpointError, match=r"2 best checkpoints, .* such as .*best_b\.pth"):
            find_checkpoint(work_dir)

    @pytest.mark.parametrize("note", [b"", b"\xff\xfe\x00", b"/elsewhere/epoch_3.pth", b"."])
    def test_a_note_of_no_checkpoint_names_none(self, note, tmp_path):
        (tmp_path / "last_checkpoint").write_bytes(note)
        assert find_checkpoint(tmp_path) == tmp_path

    def test_another_models_checkpoint(self, trained, tmp_path):
        state = {f"layers.{i}.weight": torch.zeros(2) for i in range(9)}
        torch.save(state, tmp_path / "other.pth")
        output = cli_test(trained[0], tmp_path / "other.pth", "--work-dir", tmp_path, expect=1)
        last = output.strip().splitlines()[-1]
        assert "weights missing (backbone.conv1" in last
        assert "9 weights unexpected (backbone.layers.0.weight" in last

    def test_another_number_of_classes(self, trained, tmp_path):
        output = cli_test(
            trained[0],
            trained[1] / "epoch_3.pth",
            "--work-dir",
            tmp_path,
            "--cfg-options",
            "model.num_classes=7",
            expect=1,
        )
        assert "was trained for 3 classes, and the config has 7: set model.num_classes=3" in output

    def test_truncated(self, trained, tmp_path):
        shutil.copy(trained[1] / "epoch_3.pth", tmp_path / "cut.pth")
        with open(tmp_path / "cut.pth", "r+b") as file:
            file.truncate(5000)
        output = cli_test(trained[0], tmp_path / "cut.pth", "--work-dir", tmp_path, expect=1)
        assert "cut.pth is truncated or damaged (5000 bytes)" in output
