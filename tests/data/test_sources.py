"""Data as people have them: each format, with odd files in it, is read, split and checked."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linsight.data.classification import TimmDataset
from linsight.data.loading import DataError
from linsight.data.segmentation import SegmentationFolder
from linsight.data.source_check import check_source
from linsight.data.sources import read_source, split_samples, write_lists


def write(file: Path, size=(24, 16), mode="RGB", **options) -> Path:
    """A picture of noise; no two are alike."""
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, str(file)))
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}
    if mode in channels:
        shape = (size[1], size[0], *channels[mode])
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        picture = Image.fromarray(pixels, mode=mode if mode == "CMYK" else None)
    else:
        picture = Image.new(mode, size, seed % 200)
    picture.save(file, **options)
    return file


def names(samples) -> list[str]:
    return [sample.file.name for sample in samples]


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "my pictures"
    for index in range(5):
        write(root / "Katze ü" / "nested" / f"{index} a.png")
        write(root / "dog" / f"{index}.JPG")
    turned = Image.Exif()
    turned[0x0112] = 6
    write(root / "dog" / "turned.jpg", exif=turned)
    write(root / "dog" / "grey.png", mode="L")
    write(root / "dog" / "16.png", mode="I;16")
    write(root / "dog" / "cmyk.jpg", mode="CMYK")
    write(root / "dog" / "palette.gif", mode="P")
    write(root / "dog" / "alpha.webp", mode="RGBA")
    write(root / "dog" / "scan.tif")
    write(root / "dog" / ".hidden.png")
    write(root / "loose.png")
    (root / "dog" / "notes.txt").write_text("no picture")
    return root


class TestClassFolders:
    def test_every_picture_is_found_and_split_by_class(self, folders):
        source = read_source(folders)
        assert (source.task, source.classes) == ("classification", ["Katze ü", "dog"])
        train, val = source.splits["train"], source.splits["val"]
        assert Counter(s.label for s in [*train, *val]) == {0: 5, 1: 12}
        assert Counter(s.label for s in val) == {0: 1, 1: 2}
        assert not set(names(train)) & {".hidden.png", "loose.png"}
        # A training in the folder of the data leaves its figures there.
        write(folders / "work_dirs" / "run" / "samples.png")
        assert read_source(folders).classes == source.classes
        assert any("20%" in note and "seed 0" in note for note in source.notes)
        assert any("1 images lie beside" in note for note in source.notes)
        again = read_source(folders)
        assert names(again.splits["val"]) == names(val)
        other = [names(read_source(folders, seed=seed).splits["val"]) for seed in range(1, 5)]
        assert any(drawn != names(val) for drawn in other)

    def test_splits_as_folders(self, tmp_path):
        for split, classes in (("Train", "ab"), ("valid", "a"), ("test", "ab")):
            for name in classes:
                write(tmp_path / split / name / "1.png")
        source = read_source(tmp_path)
        assert {split: len(found) for split, found in source.splits.items()} == {
            "train": 2,
            "val": 1,
            "test": 2,
        }
        assert "the split val has no image of b" in source.notes

    def test_files_of_telephones_are_named(self, folders):
        (folders / "dog" / "IMG_1.HEIC").write_bytes(b"x")
        notes = read_source(folders).notes
        assert any("1 files of Apple's format HEIC are left out" in note for note in notes)

    def test_numbers_are_sorted_as_numbers(self, tmp_path):
        for name in ("2", "10", "1"):
            for index in range(2):
                write(tmp_path / name / f"{index}.png")
        assert read_source(tmp_path).classes == ["1", "2", "10"]

    def test_what_is_written_is_what_the_data_set_reads(self, folders, tmp_path):
        source = read_source(folders)
        lists = write_lists(source, tmp_path / "lists")
        transform = {"input_size": 32}
        dataset = TimmDataset(
            str(folders), annotations=lists["train"], classes=source.classes, transform=transform
        )
        assert len(dataset) == len(source.splits["train"])
        assert dataset.metainfo["classes"] == source.classes
        labels = [dataset[index][1] for index in range(len(dataset))]
        assert labels == [sample.label for sample in source.splits["train"]]
        assert not dataset.corrupt.any()
        assert dataset.name_of(0) == str(
            Path("Katze ü", "nested", names(source.splits["train"])[0])
        )

    def test_a_label_of_no_class(self, folders, tmp_path):
        file = tmp_path / "list.csv"
        file.write_text("file,label\ndog/0.JPG,cow\n")
        with pytest.raises(DataError, match=r"'cow' of dog/0.JPG is none of the classes"):
            TimmDataset(str(folders), annotations=str(file), classes=["dog"])


def test_a_split_keeps_each_class_on_both_sides():
    samples = list("aaaaaaaaaabbc")
    train, val = split_samples(samples, str, 0.2, seed=3)
    assert Counter(train) == {"a": 8, "b": 1, "c": 1}
    assert Counter(val) == {"a": 2, "b": 1}


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_csv_of_files_and_labels(tmp_path, delimiter):
    for index in range(6):
        write(tmp_path / "images" / f"{index}.png")
    rows = [("Image", "Species", "split")]
    rows += [(f"{i}.png", "ab"[i % 2], "val" if i > 3 else "train") for i in range(6)]
    rows.append(("gone.png", "a", "train"))
    file = tmp_path / "labels.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    for path in (file, tmp_path):
        source = read_source(path)
        assert source.classes == ["a", "b"]
        assert names(source.splits["val"]) == ["4.png", "5.png"]
        assert "1 files of the CSV do not exist, such as 'gone.png'" in source.notes


RUN_LENGTHS = {"size": [16, 24], "counts": [0, 24, 360]}


def coco(images, annotations, categories=("ape", "bee")) -> dict:
    return {
        "images": [{"id": 7 * i, "file_name": n, "width": 24, "height": 16} for i, n in images],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations)],
        # Ids as people have them, and a category without an object.
        "categories": [{"id": 11 + 9 * i, "name": n} for i, n in enumerate((*categories, "idle"))],
    }


@pytest.fixture
def objects(tmp_path):
    for name in ("a b.png", "ü.png", "empty.png", "crowd.png", "e.png"):
        write(tmp_path / "pictures" / name)
    annotations = [
        {"image_id": 0, "category_id": 11, "bbox": [1, 2, 5, 6]},
        {"image_id": 0, "category_id": 20, "bbox": [1, 2, 50, 6]},
        {"image_id": 7, "category_id": 20, "bbox": [30, 2, 5, 6]},
        {"image_id": 21, "category_id": 20, "bbox": [0, 0, 2, 16], "iscrowd": 1},
        {"image_id": 28, "category_id": 11, "bbox": [0, 0, 2, 16]},
        {"image_id": 99, "category_id": 11, "bbox": [0, 0, 2, 16]},
    ]
    annotations[3]["segmentation"] = RUN_LENGTHS
    files = enumerate(("a b.png", "ü.png", "empty.png", "crowd.png", "e.png"))
    (tmp_path / "annotations.json").write_text(json.dumps(coco(files, annotations)))
    return tmp_path


class TestCOCO:
    def test_one_file_is_read_split_and_written(self, objects, tmp_path):
        source = read_source(objects)
        assert (source.task, source.classes) == ("detection", ["ape", "bee"])
        assert sum(map(len, source.splits.values())) == 5
        assert source.splits["val"]
        assert any("1 annotations are left out" in note for note in source.notes)
        assert "the category idle has no object, and is left out" in source.notes
        lists = write_lists(source, tmp_path / "lists")
        written = json.loads(Path(lists["train"]).read_text())
        written["images"] += json.loads(Path(lists["val"]).read_text())["images"]
        assert {i["file_name"] for i in written["images"]} == {
            f"pictures/{name}" for name in ("a b.png", "ü.png", "empty.png", "crowd.png", "e.png")
        }
        assert [c["id"] for c in written["categories"]] == [1, 2]
        assert all(a["area"] > 0 and "iscrowd" in a for a in written["annotations"])

    def test_faults_are_counted(self, objects):
        report = check_source(read_source(objects))
        assert report.boxes == {
            "with a box that reaches beyond the edges of the image": 1,
            "with a box outside the image": 1,
        }
        assert sum(map(sum, report.counts.values())) == 5

    def test_boxes_of_pictures_as_they_are_stored(self, tmp_path):
        images, annotations = [], []
        for number, orientation in enumerate((1, 3, 6, 6), 1):
            exif = Image.Exif()
            exif[0x0112] = orientation
            write(tmp_path / f"{number}.jpg", size=(24, 16), exif=exif)
            images.append((number, f"{number}.jpg"))
            annotations.append({"image_id": 7 * number, "category_id": 11, "bbox": [20, 1, 3, 3]})
        content = coco(images, annotations)
        (tmp_path / "labels.json").write_text(json.dumps(content))
        report = check_source(read_source(tmp_path))
        assert not report.upright
        assert not report.boxes
        (fault,) = report.faults()
        assert "1 images are turned or mirrored by EXIF (2.jpg)" in fault
        content["images"][0]["width"] = 25
        (tmp_path / "labels.json").write_text(json.dumps(content))
        (corrupt,) = check_source(read_source(tmp_path)).corrupt.items()
        assert corrupt == (tmp_path / "1.jpg", "it has 24 x 16 pixels, and its entry 25 x 16")

    def test_what_other_programs_write(self, tmp_path):
        """Sizes as texts, names with backslashes, outlines without boxes, a category twice."""
        content = coco([(i, f"in\\{i}.png") for i in range(4)], [], ("ape", "ape"))
        for image in content["images"]:
            image |= {"width": "24", "height": "16"}
        outline = {"segmentation": [[1, 2, 9, 2, 5, 8], [3, 9, 4, 9, 4, 12]]}
        content["annotations"] = [
            {"id": 9 + i, "image_id": 7 * i, "category_id": 11 + 9 * (i % 2), **outline}
            for i in range(4)
        ]
        for i in range(4):
            write(tmp_path / "pictures" / "in" / f"{i}.png")
        (tmp_path / "labels.json").write_text(json.dumps(content))
        source = read_source(tmp_path)
        assert (source.task, source.classes) == ("instances", ["ape"])
        assert source.splits["train"][0].size == (24, 16)
        assert source.splits["train"][0].label[0]["bbox"] == [1, 2, 8, 10]
        note = "labels.json: 4 annotations without a box, which their outlines give: mended"
        assert note in source.notes
        report = check_source(source)
        assert not report.corrupt
        assert not report.boxes

    def test_boxes_in_shares_of_the_sides(self, tmp_path):
        annotations = [
            {"image_id": 7 * i, "category_id": 11, "bbox": [0.1, 0.2, 0.3, 0.4]} for i in range(4)
        ]
        for i in range(4):
            write(tmp_path / f"{i}.png")
        content = coco([(i, f"{i}.png") for i in range(4)], annotations)
        (tmp_path / "labels.json").write_text(json.dumps(content))
        assert check_source(read_source(tmp_path)).faults() == [
            "4 objects with a box less than a pixel wide or high"
        ]

    def test_files_for_train_and_val_with_masks(self, tmp_path):
        polygon = {"category_id": 11, "bbox": [1, 2, 5, 6], "segmentation": [[1, 2, 6, 2, 6, 8]]}
        for split in ("train", "val"):
            write(tmp_path / f"{split}2017" / f"{split}.png")
            content = coco([(1, f"{split}.png")], [{"image_id": 7, **polygon}])
            file = tmp_path / "annotations" / f"instances_{split}2017.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content))
        source = read_source(tmp_path)
        assert source.task == "instances"
        assert names(source.splits["val"]) == ["val.png"]
        assert read_source(tmp_path, task="detection").task == "detection"

    def test_faulty_outlines(self, tmp_path):
        polygon, line = [[1, 2, 6, 2, 6, 8]], [[1, 2, 6, 2]]
        swapped = {"size": [24, 16], "counts": [384]}
        outlines = [polygon, polygon + line, line, swapped, RUN_LENGTHS]
        common = {"category_id": 11, "bbox": [1, 2, 5, 6]}
        annotations = [
            {"image_id": 7 * i, "segmentation": outline, **common}
            for i, outline in enumerate(outlines)
        ]
        for i in range(5):
            write(tmp_path / f"{i}.png")
        file = tmp_path / "labels.json"
        file.write_text(json.dumps(coco([(i, f"{i}.png") for i in range(5)], annotations)))
        source = read_source(file)
        assert source.task == "instances"
        kept = {s.file.name: s.label for found in source.splits.values() for s in found}
        assert [len(kept[f"{i}.png"]) for i in range(5)] == [1, 1, 0, 0, 1]
        assert kept["1.png"][0]["segmentation"] == polygon
        assert {
            "1 objects with polygons of fewer than 3 points are left out",
            "1 objects with run lengths of another size than the image's are left out",
        } <= set(source.notes)
        annotations[0]["segmentation"] = [[]]
        file.write_text(json.dumps(coco([(i, f"{i}.png") for i in range(5)], annotations)))
        source = read_source(file)
        assert source.task == "detection"
        note = "1 of 5 objects have no outline, so that boxes alone are learned"
        assert note in source.notes
        assert sum(map(len, (s.label for f in source.splits.values() for s in f))) == 5

    def test_images_that_are_nowhere(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps(coco([(1, "x.png")], [])))
        with pytest.raises(DataError, match=r"its images, such as 'x.png', are in no folder"):
            read_source(tmp_path)


class TestYOLO:
    @pytest.mark.parametrize("layout", ["split by split", "beside"])
    def test_without_yaml(self, tmp_path, layout):
        """As Roboflow lays out its data, and as LabelImg writes."""
        for split in ("train", "valid"):
            for index in range(2):
                name = f"{split}{index}"
                images, labels = (
                    (tmp_path / split / "images", tmp_path / split / "labels")
                    if layout == "split by split"
                    else (tmp_path, tmp_path)
                )
                write(images / f"{name}.png", size=(100, 50))
                labels.mkdir(exist_ok=True)
                (labels / f"{name}.txt").write_text(f"{index} 0.5 0.5 0.2 0.4\n")
        (tmp_path / "classes.txt").write_text("ape\nbee\n")
        source = read_source(tmp_path)
        assert (source.format, source.classes) == ("YOLO's labels", ["ape", "bee"])
        assert sum(map(len, source.splits.values())) == 4
        exif = Image.Exif()
        exif[0x0112] = 6
        write(source.splits["train"][0].file, size=(50, 100), exif=exif)
        (fault,) = check_source(read_source(tmp_path)).faults()
        assert fault.startswith("1 images are turned or mirrored by EXIF (")
        assert fault.endswith("set upright; if they are not, delete the orientation in the files")
        if layout == "split by split":
            assert names(source.splits["val"]) == ["valid0.png", "valid1.png"]

    def test_a_yaml_whose_images_are_nowhere(self, tmp_path):
        (tmp_path / "data.yaml").write_text("train: nowhere\nnames: [ape]\n")
        with pytest.raises(DataError, match=r"data.yaml: train is 'nowhere', where no image is"):
            read_source(tmp_path / "data.yaml")

    def test_yaml_and_labels(self, tmp_path):
        for split in ("train", "val"):
            for index in range(2):
                write(tmp_path / "images" / split / f"{index}.png", size=(100, 50))
            label = tmp_path / "labels" / split / "0.txt"
            label.parent.mkdir(parents=True)
            label.write_text("2 0.5 0.5 0.2 0.4\nx y\n9 0.5 0.5 0.2 0.4\n")
        (tmp_path / "data.yaml").write_text(
            "path: .\ntrain: images/train\nval: images/val\nnames: {0: ape, 2: bee}\n"
        )
        source = read_source(tmp_path)
        assert (source.task, source.classes) == ("detection", ["ape", "bee"])
        first, second = source.splits["train"]
        assert first.label == [{"label": 1, "bbox": pytest.approx([40, 15, 20, 20])}]
        assert second.label == []
        assert "4 lines of labels are left out, such as 0.png, line 2: 'x y'" in source.notes

    def test_polygons_without_yaml(self, tmp_path):
        for index in range(4):
            write(tmp_path / "images" / f"{index}.jpg", size=(10, 10))
            label = tmp_path / "labels" / f"{index}.txt"
            label.parent.mkdir(exist_ok=True)
            label.write_text("0 0.1 0.1 0.5 0.1 0.5 0.9\n")
        source = read_source(tmp_path)
        assert (source.task, source.classes) == ("instances", ["0"])
        (obj,) = source.splits["train"][0].label
        assert obj["bbox"] == pytest.approx([1, 1, 4, 8])
        assert len(source.splits["val"]) == 1


def test_pascal_voc(tmp_path):
    for index in range(3):
        write(tmp_path / "JPEGImages" / f"{index}.jpg")
        file = tmp_path / "Annotations" / f"{index}.xml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f"<annotation><filename>{index}.jpg</filename><object><name>ape</name><bndbox>"
            "<xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>8</ymax></bndbox></object>"
            "</annotation>"
        )
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n")
    (lists / "val.txt").write_text("2\n")
    source = read_source(tmp_path)
    assert source.classes == ["ape"]
    assert names(source.splits["val"]) == ["2.jpg"]
    assert source.splits["train"][0].label[0]["bbox"] == [0, 1, 10, 7]


def write_mask(file: Path, values, size=(24, 16)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    mask = np.resize(np.array(values, np.uint8), (size[1], size[0]))
    Image.fromarray(mask).save(file)


class TestMasks:
    @pytest.mark.parametrize(
        ("values", "classes", "table"),
        [
            ([0, 255], ["background", "foreground"], {0: 0, 255: 1}),
            ([0, 1], ["background", "foreground"], {0: 0, 1: 1}),
            ([0, 5, 9, 255], ["background", "5", "9"], {0: 0, 5: 1, 9: 2}),
            ([0, 128, 255], ["background", "128", "255"], {0: 0, 128: 1, 255: 2}),
        ],
    )
    def test_numbers_become_classes(self, tmp_path, values, classes, table):
        for split in ("train", "val"):
            write(tmp_path / split / "images" / "a.jpg")
            write_mask(tmp_path / split / "masks" / "a.png", values)
        source = read_source(tmp_path)
        assert (source.task, source.classes) == ("segmentation", classes)
        assert source.label_map == table
        report = check_source(source)
        assert all(report.counts["train"])
        assert not report.faults()

    def test_written_pairs_are_what_the_data_set_reads(self, tmp_path):
        for index in range(5):
            write(tmp_path / "images" / "deep" / f"{index} ü.jpg")
            write_mask(tmp_path / "masks" / "deep" / f"{index} ü_mask.png", [0, 3])
        (tmp_path / "classes.txt").write_text("field\na\nb\nroad\n")
        source = read_source(tmp_path)
        assert source.classes == ["field", "a", "b", "road"]
        lists = write_lists(source, tmp_path / "lists")
        dataset = SegmentationFolder(
            str(tmp_path),
            annotations=lists["train"],
            classes=source.classes,
            label_map=source.label_map,
            test_mode=True,
        )
        image, labels = dataset[0]
        assert (len(dataset), image.shape, labels.shape) == (4, (3, 16, 24), (16, 24))
        assert labels.unique().tolist() == [0, 3]
        assert dataset.name_of(0).startswith("images")

    def test_damaged_masks_are_left_to_the_check(self, tmp_path):
        for index in range(4):
            write(tmp_path / "images" / f"{index}.jpg")
            write_mask(tmp_path / "masks" / f"{index}.png", [0, 1, 2])
        (tmp_path / "masks" / "1.png").write_bytes(b"x")
        source = read_source(tmp_path)
        assert source.classes == ["background", "1", "2"]
        (fault,) = check_source(source).faults()
        assert fault.startswith("1 masks do not fit: 1.png")

    def test_masks_of_pascal_voc(self, tmp_path):
        for index in range(4):
            write(tmp_path / "JPEGImages" / f"{index}.jpg")
            write_mask(tmp_path / "SegmentationClass" / f"{index}.png", [0, 1, 255])
        (tmp_path / "Annotations").mkdir()
        (tmp_path / "Annotations" / "0.xml").write_text(
            "<annotation><filename>0.jpg</filename><object><name>a</name><bndbox><xmin>1</xmin>"
            "<ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>"
        )
        source = read_source(tmp_path, task="segmentation")
        assert source.label_map == {0: 0, 1: 1}

    def test_masks_as_jpeg(self, tmp_path):
        for index in range(2):
            write(tmp_path / "images" / f"{index}.png")
            write(tmp_path / "masks" / f"{index}.jpg", mode="L")
        with pytest.raises(DataError, match=r"0\.jpg: JPEG does not keep the numbers of a mask"):
            read_source(tmp_path)

    def test_faults_are_named(self, tmp_path):
        for index in range(4):
            write(tmp_path / "images" / f"{index}.jpg")
            write_mask(tmp_path / "masks" / f"{index}.png", [0, 1, 2], size=(24, 16 + index // 3))
        report = check_source(read_source(tmp_path))
        assert len(report.masks) == 1
        assert "1 masks do not fit" in report.faults()[0]

    def turned_masks(self, root, orientations):
        """JPEGs whose masks are of the pixels as they are stored."""
        for orientation in orientations:
            exif = Image.Exif()
            exif[0x0112] = orientation
            write(root / "images" / f"{orientation}.png", exif=exif)
            write_mask(root / "masks" / f"{orientation}.png", [0, 1])
        source = read_source(root)
        return source, check_source(source)

    def test_one_size_tells_how_all_masks_were_drawn(self, tmp_path):
        source, report = self.turned_masks(tmp_path, (1, 2, 3, 4, 6))
        assert {told: len(found) for told, found in report.turned.items()} == {
            "stored": 1,
            "unknown": 3,
        }
        assert not report.upright
        (fault,) = report.faults()
        assert "as they are stored, as by their sizes those of 1 others; if they are not" in fault
        lists = write_lists(source, tmp_path / "lists")
        for split, samples in source.splits.items():
            images = SegmentationFolder(
                str(tmp_path),
                annotations=lists[split],
                classes=source.classes,
                label_map=source.label_map,
                test_mode=True,
                upright=report.upright,
                mean=(0, 0, 0),
                std=(1, 1, 1),
            )
            for (image, labels), sample in zip(images, samples, strict=False):
                with Image.open(sample.file) as stored:
                    pixels = np.asarray(stored)
                assert np.array_equal((image * 255).round().byte().permute(1, 2, 0), pixels)
                assert labels.shape == pixels.shape[:2]

    def test_masks_that_tell_nothing_are_named(self, tmp_path):
        _, report = self.turned_masks(tmp_path, (1, 3, 4))
        assert report.upright
        (fault,) = report.faults()
        assert fault == (
            "2 images are turned or mirrored by EXIF (4.png), and their labels are taken to be "
            "those of the pictures set upright; if they are not, set upright=False in the data "
            "sets of the config"
        )


class TestTables:
    def test_names_without_endings(self, tmp_path):
        for index in range(4):
            write(tmp_path / "images" / f"{index}.webp")
        rows = "".join(f"{i}\tcat {i % 2}\n" for i in range(4))
        (tmp_path / "labels.tsv").write_text("Image\tLabel\n" + rows)
        for path in (tmp_path, tmp_path / "labels.tsv"):
            source = read_source(path)
            assert source.classes == ["cat 0", "cat 1"]
            assert sum(map(len, source.splits.values())) == 4

    def test_another_encoding(self, tmp_path):
        (tmp_path / "labels.csv").write_bytes("file,label\nä.png,ö\n".encode("latin-1"))
        with pytest.raises(DataError, match=r"labels\.csv is no text in UTF-8: save it so"):
            read_source(tmp_path / "labels.csv")


class TestCheck:
    def test_damaged_files_and_duplicates(self, folders):
        whole = (folders / "dog" / "0.JPG").read_bytes()
        (folders / "dog" / "half.jpg").write_bytes(whole[: len(whole) // 2])
        (folders / "dog" / "empty.png").write_bytes(b"")
        source = read_source(folders)
        copy = source.splits["val"][0].file
        source.splits["train"][0].file.write_bytes(copy.read_bytes())
        report = check_source(source)
        assert {file.name for file in report.corrupt} == {"half.jpg", "empty.png"}
        assert [pair[1].name for pair in report.duplicates] == [copy.name]
        corrupt, pair = report.faults()
        assert all(str(file) in corrupt for file in report.corrupt)
        assert str(copy) in pair
        assert report.median_size == (16, 24)
        assert len(report.faults()) == 2

    def test_ends_tell_of_missing_parts(self, folders, monkeypatch):
        """So many images are not decoded."""
        monkeypatch.setattr("linsight.data.source_check.DECODED", 2)
        for name in ("0.JPG", "grey.png"):
            file = folders / "dog" / name
            file.write_bytes(file.read_bytes()[:-40])
        report = check_source(read_source(folders))
        assert {file.name for file in report.corrupt} == {"0.JPG", "grey.png"}
        assert not report.decoded


class TestRefusals:
    def test_nothing_that_is_known(self, tmp_path):
        write(tmp_path / "a.png")
        with pytest.raises(DataError, match="no data of a format that is known: a folder for each"):
            read_source(tmp_path)

    def test_nothing_at_all(self, tmp_path):
        with pytest.raises(DataError, match="do not exist"):
            read_source(tmp_path / "gone")

    def test_another_task(self, folders):
        with pytest.raises(DataError, match="are for classification, not for segmentation"):
            read_source(folders, task="segmentation")

    def test_one_class(self, tmp_path):
        for index in range(3):
            write(tmp_path / "cat" / f"{index}.png")
        with pytest.raises(DataError, match="a single class, 'cat'"):
            read_source(tmp_path)
