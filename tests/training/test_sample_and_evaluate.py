# SPDX-License-Identifier: Apache-2.0
"""`examples/sample.py` and `examples/evaluate.py` as they are run, and the Frechet distance against its closed form."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from accelerate.state import AcceleratorState

from diffusers_dyna import (
    DynaDiTImg2ImgPipeline,
    DynaDiTPipeline,
    DynaDiTTextToImagePipeline,
    DynaUNetPipeline,
    FlowMatchODEScheduler,
)
from diffusers_dyna.training.data import load_digits
from diffusers_dyna.training.randomness import keyed_seed

from ..testing_utils import UNCONDITIONAL, randn, tiny_dyna_dit, tiny_text_encoder, tiny_tokenizer, tiny_unet


EXAMPLES = Path(__file__).parents[2] / "examples"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sample():
    return load_script("sample")


@pytest.fixture(scope="module")
def evaluate():
    return load_script("evaluate")


@pytest.fixture(scope="module")
def pipeline_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "unet"
    DynaUNetPipeline(tiny_unet(), FlowMatchODEScheduler()).save_pretrained(path)
    return path


def words(options):
    """`{"num_images": 3}` as `["--num_images", "3"]`."""
    flags = []
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


@pytest.fixture
def draw(sample, pipeline_path, tmp_path):
    """Runs sample.py in this process and returns its arrays and its protocol."""

    def run(name="samples", **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        output = tmp_path / f"{name}.npz"
        options = {"num_images": 7, "batch_size": 4, "num_inference_steps": 2, "device": "cpu", **options}
        sample.main(sample.parse_args(words({"pipeline_path": pipeline_path, "output": output, **options})))
        return dict(np.load(output)), json.loads(output.with_suffix(".json").read_text())

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def gaussian_features(num_samples, mean, covariance, seed=0):
    """Features whose mean and unbiased covariance are exactly the given ones."""
    white = randn(num_samples, len(mean), seed=seed).double()
    white = white - white.mean(0)
    factor = torch.linalg.cholesky(white.T @ white / (num_samples - 1))
    white = torch.linalg.solve_triangular(factor, white.T, upper=False).T
    values, vectors = torch.linalg.eigh(covariance.double())
    return white @ (vectors * values.clamp(min=0).sqrt()).T + mean


class TestFrechetDistance:
    def test_of_a_set_and_itself_is_zero(self, evaluate):
        features = randn(50, 8)
        assert evaluate.frechet_distance(features, features.flip(0)) < 1e-12

    def test_of_a_shift_is_the_square_of_its_length(self, evaluate):
        features = randn(50, 3).double()
        shifted = features + torch.tensor([1.0, -2.0, 0.5])
        assert evaluate.frechet_distance(features, shifted) == pytest.approx(5.25, rel=1e-9)

    def test_of_diagonal_covariances(self, evaluate):
        a = gaussian_features(60, torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
        b = gaussian_features(40, torch.tensor([1.0, 0.0, 0.0]), torch.diag(torch.tensor([4.0, 4.0, 1.0])), seed=1)
        # 1 for the means, and (1 - 2)^2 + (2 - 2)^2 + (3 - 1)^2 for the standard deviations
        assert evaluate.frechet_distance(a, b) == pytest.approx(6, rel=1e-9)
        assert evaluate.frechet_distance(b, a) == pytest.approx(6, rel=1e-9)

    def test_of_covariances_that_do_not_commute(self, evaluate):
        cov_a, cov_b = (
            torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(),
            torch.tensor([[4.0, -1.0], [-1.0, 1.0]]).double(),
        )
        assert not torch.allclose(cov_a @ cov_b, cov_b @ cov_a)
        a = gaussian_features(30, torch.zeros(2), cov_a)
        b = gaussian_features(30, torch.zeros(2), cov_b, seed=1)
        # Of a 2 x 2 matrix, trace(root)^2 = trace + 2 sqrt(det).
        product = cov_a @ cov_b
        trace_of_root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
        expected = (cov_a.trace() + cov_b.trace() - 2 * trace_of_root).item()
        assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)

    def test_of_covariances_without_full_rank(self, evaluate):
        few = randn(4, 20).double()
        # The root of a rounding error of 1e-16 is 1e-8.
        assert evaluate.frechet_distance(few, few) < 1e-6
        left, right = few.clone(), few.clone()
        left[:, 10:] = 0
        right[:, :10] = 0
        # What does not overlap adds up.
        expected = (left.mean(0) - right.mean(0)).square().sum() + left.var(0).sum() + right.var(0).sum()
        assert evaluate.frechet_distance(left, right) == pytest.approx(expected.item(), rel=1e-6)

    def test_bad_features(self, evaluate):
        with pytest.raises(ValueError, match=r"`features_b` has shape \(5, 3\); both need .* same number of features"):
            evaluate.frechet_distance(randn(5, 4), randn(5, 3))
        with pytest.raises(ValueError, match=r"`features_a` has shape \(1, 4\); both need the shape \(at least 2"):
            evaluate.frechet_distance(randn(1, 4), randn(5, 4))
        with pytest.raises(ValueError, match="`features_b` has values that are not finite"):
            evaluate.frechet_distance(randn(5, 4), randn(5, 4) / 0)


class TestSample:
    def test_what_is_written(self, draw, tmp_path):
        arrays, protocol = draw(guidance_scale=2.0, seed=3, images_dir=tmp_path / "images")
        assert list(arrays) == ["arr_0", "labels"]
        assert arrays["arr_0"].shape == (7, 8, 8, 3)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert {path.name for path in tmp_path.iterdir()} == {"samples.npz", "samples.json", "images"}
        for i in range(7):
            image = np.asarray(PIL.Image.open(tmp_path / "images" / f"{i:06d}.png"))
            np.testing.assert_array_equal(image, arrays["arr_0"][i])

        assert protocol["num_images"] == 7
        assert protocol["seed"] == 3
        assert protocol["guidance_scale"] == 2.0
        assert protocol["num_inference_steps"] == 2
        assert protocol["evaluations_per_image"] == 4  # both halves of the guidance
        assert protocol["scheduler"]["class"] == "FlowMatchODEScheduler"
        assert protocol["scheduler"]["solver"] == "euler"
        assert protocol["pipeline"] == "DynaUNetPipeline"
        assert protocol["seconds_per_image"] > 0
        assert protocol["compute_ratio"] is None
        assert protocol["versions"]["torch"] == torch.__version__
        assert "commit" in protocol

    def test_an_image_does_not_depend_on_its_batch_or_on_how_many_there_are(self, draw):
        arrays, _ = draw()
        one_by_one, _ = draw("one", batch_size=1)
        np.testing.assert_array_equal(one_by_one["arr_0"], arrays["arr_0"])
        fewer, _ = draw("fewer", num_images=5)
        np.testing.assert_array_equal(fewer["arr_0"], arrays["arr_0"][:5])
        assert len({image.tobytes() for image in arrays["arr_0"]}) == 7

    def test_the_images_are_those_of_the_pipeline(self, draw, sample, pipeline_path):
        arrays, _ = draw(labels=[2, 1], seed=5)
        assert arrays["labels"].tolist() == [2, 1, 2, 1, 2, 1, 2]
        generator = torch.Generator().manual_seed(sample.keyed_seed(5, "sample", 3))
        pipe = DynaUNetPipeline.from_pretrained(pipeline_path)
        image = pipe([1], num_inference_steps=2, generator=[generator]).images[0]
        np.testing.assert_array_equal(np.asarray(image), arrays["arr_0"][3])

    def test_random_labels_are_a_function_of_seed_and_index(self, sample):
        labels = sample.choose_labels(["random"], 300, 3, seed=0)
        assert np.bincount(labels).min() > 70
        np.testing.assert_array_equal(sample.choose_labels(["random"], 20, 3, seed=0), labels[:20])
        assert (sample.choose_labels(["random"], 300, 3, seed=1) != labels).any()

    def test_without_classes(self, draw, tmp_path):
        path = tmp_path / "unconditional"
        DynaUNetPipeline(tiny_unet(**UNCONDITIONAL), FlowMatchODEScheduler()).save_pretrained(path)
        arrays, protocol = draw(pipeline_path=path)
        assert list(arrays) == ["arr_0"]
        assert len({image.tobytes() for image in arrays["arr_0"]}) == 7
        assert protocol["labels"] is None
        with pytest.raises(ValueError, match="`--labels` random was given, but the model has no classes"):
            draw(pipeline_path=path, labels="random")

    def test_a_dynamic_model(self, draw, tmp_path):
        path = tmp_path / "dit"
        transformer = tiny_dyna_dit(in_channels=1, learn_sigma=False)
        DynaDiTPipeline(transformer, FlowMatchODEScheduler()).save_pretrained(path)
        arrays, protocol = draw(pipeline_path=path)
        assert arrays["arr_0"].shape == (7, 8, 8, 1)
        assert 0.2 < protocol["compute_ratio"] < 0.9
        one_by_one, one_protocol = draw("one", pipeline_path=path, batch_size=1)
        np.testing.assert_array_equal(one_by_one["arr_0"], arrays["arr_0"])
        assert one_protocol["compute_ratio"] == pytest.approx(protocol["compute_ratio"])
        complete, protocol = draw("complete", pipeline_path=path, complete_model=True)
        assert protocol["compute_ratio"] == 1
        assert (complete["arr_0"] != arrays["arr_0"]).any()
        narrow, protocol = draw("narrow", pipeline_path=path, width_mult=0.5)
        assert protocol["compute_ratio"] < 1
        assert (narrow["arr_0"] != complete["arr_0"]).any()

    @pytest.mark.slow
    def test_prompts(self, draw, tmp_path):
        model = tiny_dyna_dit(in_channels=3, num_classes=None, cross_attention_dim=16)
        pipe = DynaDiTTextToImagePipeline(
            model, FlowMatchODEScheduler(), tiny_text_encoder(7), tiny_tokenizer(list("abc"))
        )
        pipe.save_pretrained(tmp_path / "text")
        path, prompts = tmp_path / "prompts.txt", ["a b", "c", "b"]
        path.write_text("a b\n\nc\n b\n")
        arrays, protocol = draw(pipeline_path=tmp_path / "text", prompts=path, guidance_scale=2)
        assert (arrays.keys(), protocol["prompts"], protocol["labels"]) == ({"arr_0"}, prompts, None)
        generator = [torch.Generator().manual_seed(keyed_seed(0, "sample", i)) for i in range(7)]
        images = pipe(
            [prompts[i % 3] for i in range(7)],
            num_inference_steps=2,
            guidance_scale=2,
            generator=generator,
            output_type="np",
        ).images
        assert np.abs(arrays["arr_0"] / 255 - images).max() < 0.01
        assert images.reshape(7, -1).std(axis=0).max() > 0.05
        path.write_text("\n")
        for options, message in (
            ({}, "`--prompts` is missing: DynaDiTTextToImagePipeline draws texts"),
            ({"prompts": path}, "prompts.txt is empty. Write a prompt a line"),
            ({"prompts": tmp_path / "no.txt"}, "no.txt is not a file. Give a text file"),
        ):
            with pytest.raises(ValueError, match=message):
                draw(pipeline_path=tmp_path / "text", **options)

    def test_pipelines_that_it_is_not_for(self, draw, pipeline_path, tmp_path):
        with pytest.raises(ValueError, match="`--prompts` p.txt was given, but DynaUNetPipeline reads no text"):
            draw(prompts="p.txt")
        pipe = DynaDiTImg2ImgPipeline(tiny_dyna_dit(in_channels=3), FlowMatchODEScheduler())
        pipe.save_pretrained(tmp_path / "edit")
        with pytest.raises(ValueError, match="DynaDiTImg2ImgPipeline needs an image, and this script has none"):
            draw(pipeline_path=tmp_path / "edit", output=tmp_path / "new" / "samples.npz")
        assert not (tmp_path / "new").exists()

    def test_two_processes_draw_what_one_draws(self, draw, pipeline_path, tmp_path):
        arrays, _ = draw(images_dir=tmp_path / "one")
        output, images_dir = tmp_path / "two.npz", tmp_path / "two"
        options = {"pipeline_path": pipeline_path, "num_images": 7, "batch_size": 2, "num_inference_steps": 2}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, EXAMPLES / "sample.py", *words({**options, "output": output, "images_dir": images_dir})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        # Whether accelerate sees the processes of a CPU unasked depends on its version.
        if result.returncode == 0:
            assert json.loads(output.with_suffix(".json").read_text())["num_processes"] == 2
        else:
            assert "set ACCELERATE_USE_CPU=true" in result.stderr
        environment["ACCELERATE_USE_CPU"] = "true"
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert json.loads(output.with_suffix(".json").read_text())["num_processes"] == 2
        two = np.load(output)
        np.testing.assert_array_equal(two["arr_0"], arrays["arr_0"])
        np.testing.assert_array_equal(two["labels"], arrays["labels"])
        for i in range(7):
            assert (images_dir / f"{i:06d}.png").read_bytes() == (tmp_path / "one" / f"{i:06d}.png").read_bytes()
        assert not list(tmp_path.glob("*partial*"))

    def test_bad_arguments(self, draw, capsys, tmp_path):
        for option in ({"complete_model": True}, {"width_mult": 0.5}):
            name = next(iter(option))
            with pytest.raises(ValueError, match=f"`--{name}` is for dynamic models: DynaUNetPipeline does not take"):
                draw(**option)
        for labels in (["even"], [0, 3], [-1], ["equal", 1]):
            with pytest.raises(ValueError, match="must be equal, random, or labels from 0 to 2"):
                draw(labels=labels)
        assert not list(tmp_path.glob("*.npz"))
        for options, message in (
            ({"num_images": 0}, "`--num_images` 0 must be at least 1"),
            ({"output": "samples.png"}, "`--output` samples.png must end in .npz"),
        ):
            with pytest.raises(SystemExit):
                draw(**options)
            assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def classifier(evaluate, tmp_path_factory):
    """A classifier of digits, made as by the command line."""
    path = tmp_path_factory.mktemp("classifier") / "digits.safetensors"
    options = {"dataset": "digits", "num_epochs": 4, "output": path}
    evaluate.main(evaluate.parse_args(["train-classifier", *words(options)]))
    return path


@pytest.fixture
def compare(evaluate, classifier, tmp_path):
    """Runs the command `compare` on digits in this process and returns its result."""

    def run(images, labels=None, **options):
        arrays = {"arr_0": images} if labels is None else {"arr_0": images, "labels": labels}
        np.savez(tmp_path / "samples.npz", **arrays)
        output = tmp_path / "result.json"
        options = {"samples": tmp_path / "samples.npz", "features": classifier, "output": output, **options}
        if "reference" not in options:
            options = {"dataset": "digits", **options}
        evaluate.main(evaluate.parse_args(["compare", *words(options)]))
        return json.loads(output.read_text())

    return run


@pytest.fixture(scope="module")
def digits():
    source = load_digits()
    return source.images[..., None], source.labels.astype(np.int64)


class TestClassifier:
    def test_it_reads_held_out_digits(self, classifier):
        facts = json.loads(classifier.with_suffix(".json").read_text())
        assert facts["held_out_accuracy"] >= 0.9
        assert facts["num_train_images"] + facts["num_held_out_images"] == 1797
        assert (facts["resolution"], facts["channels"], facts["num_classes"]) == (8, 1, 10)
        assert not list(classifier.parent.glob("*.partial"))

    def test_the_file_says_what_it_is_and_gives_the_same_classifier(self, evaluate, classifier, digits):
        model, facts = evaluate.load_classifier(classifier, "cpu")
        assert facts == json.loads(classifier.with_suffix(".json").read_text())
        assert sum(parameter.numel() for parameter in model.parameters()) == facts["num_parameters"]
        args = evaluate.parse_args(["train-classifier", "--dataset", "digits", "--output", "x.safetensors"])
        _, held_out = evaluate.read_split(args, None, held_out=True)
        features, logits = evaluate.run_classifier(model, held_out["images"], "cpu")
        accuracy = (logits.argmax(1).numpy() == held_out["labels"]).mean()
        assert accuracy == facts["held_out_accuracy"]
        assert features.shape == (facts["num_held_out_images"], facts["widths"][-1])
        # The features are what the last layer reads.
        torch.testing.assert_close(model.head(features), logits)

    def test_the_splits_share_no_image(self, evaluate, digits):
        args = evaluate.parse_args(["train-classifier", "--dataset", "digits", "--output", "x.safetensors"])
        splits = [evaluate.read_split(args, None, held_out)[1] for held_out in (False, True)]
        both = np.concatenate([split["images"] for split in splits])
        assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in digits[0])

    def test_images_are_prepared_as_for_training(self, evaluate):
        args = ["train-classifier", "--dataset", "digits", "--output", "x.safetensors", "--resolution", "12"]
        args = evaluate.parse_args(args)
        source, split = evaluate.read_split(args, 12, held_out=True)
        order = torch.randperm(1797, generator=evaluate.keyed_generator(0, "held_out"))[:359].sort().values
        expected = evaluate.data.ImageTransform(12, 1)(source.read(int(order[7])), torch.Generator())
        pixel_values = evaluate.to_pixel_values(split["images"][7:8], "cpu")[0]
        torch.testing.assert_close(pixel_values, expected)

    def test_the_same_seed_gives_the_same_file(self, evaluate, tmp_path):
        paths = [tmp_path / f"{name}.safetensors" for name in ("first", "second", "other")]
        for path, seed in zip(paths, (0, 0, 1), strict=True):
            options = {"dataset": "digits", "num_epochs": 1, "output": path, "seed": seed}
            evaluate.main(evaluate.parse_args(["train-classifier", *words(options)]))
        first, second, other = (load_file(path) for path in paths)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["head.weight"], other["head.weight"])


class TestCompare:
    def test_real_images_are_close_and_read_as_labelled(self, compare, digits, classifier):
        images, labels = digits[0][:500], digits[1][:500]
        result = compare(images, labels)
        facts = json.loads(classifier.with_suffix(".json").read_text())
        assert result["metric"] == "Frechet distance on the features of a classifier; not FID"
        assert result["class_accuracy"] >= 0.9
        assert result["class_accuracy_of_held_out"] == facts["held_out_accuracy"]
        assert result["num_samples"] == 500
        assert result["num_held_out"] == 359
        assert result["reference"]["num_images"] == 1438
        assert result["classifier"] == facts
        assert len(result["sha256"]) == 64
        assert result["environment"]["versions"]["torch"] == torch.__version__

        counts = np.bincount(labels)
        mean = sum(result["class_accuracy_by_label"][str(k)] * n for k, n in enumerate(counts)) / 500
        assert result["class_accuracy"] == pytest.approx(mean)
        error = np.sqrt(mean * (1 - mean) / 500)
        assert result["class_accuracy_standard_error"] == pytest.approx(error)

        wrong = compare(255 - images, (labels + 1) % 10)
        assert wrong["class_accuracy"] < 0.3
        assert wrong["frechet_distance"] > 5 * result["frechet_distance"]
        assert wrong["frechet_distance_of_held_out"] == result["frechet_distance_of_held_out"]

    def test_the_distance_is_that_of_the_features(self, evaluate, compare, classifier, digits, tmp_path):
        np.savez(tmp_path / "reference.npz", arr_0=digits[0][:300])
        result = compare(digits[0][300:700], reference=tmp_path / "reference.npz")
        model, _ = evaluate.load_classifier(classifier, "cpu")
        features, _ = evaluate.run_classifier(model, digits[0][:700], "cpu")
        expected = evaluate.frechet_distance(features[300:], features[:300])
        # Batches cut at other places round differently.
        assert result["frechet_distance"] == pytest.approx(expected, rel=1e-3)
        assert "class_accuracy" not in result
        assert "frechet_distance_of_held_out" not in result

    def test_the_floor_has_as_many_images_as_there_are_samples(self, compare, digits):
        assert compare(digits[0][:100])["num_held_out"] == 100

    def test_the_protocol_of_the_samples_is_in_the_result(self, compare, digits, tmp_path):
        (tmp_path / "samples.json").write_text('{"seed": 17}')
        assert compare(digits[0][:50])["samples"] == {"seed": 17}

    @pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the public file is of that format
    def test_fid_runs_the_named_network(self, compare, evaluate, digits, tmp_path):
        class Network(torch.nn.Module):
            def forward(self, images: torch.Tensor, return_features: bool) -> torch.Tensor:
                assert images.dtype == torch.uint8
                assert images.shape[1] == 3
                return images.float().mean(dim=(2, 3))

        torch.jit.script(Network()).save(tmp_path / "inception.pt")
        np.savez(tmp_path / "reference.npz", arr_0=digits[0][:200])
        path = tmp_path / "inception.pt"
        result = compare(digits[0][200:300], features=f"inception:{path}", reference=tmp_path / "reference.npz")
        assert result["metric"] == "FID"
        features = torch.from_numpy(digits[0][:300]).float().mean(dim=(1, 2)).expand(-1, 3)
        expected = evaluate.frechet_distance(features[200:], features[:200])
        assert result["frechet_distance"] == pytest.approx(expected, rel=1e-4)

    def test_bad_files(self, compare, digits, tmp_path):
        images, labels = digits
        with pytest.raises(ValueError, match="there is no such file. FID needs the Inception weights"):
            compare(images, features="inception:nowhere.pt")
        with pytest.raises(ValueError, match="`--features` nowhere.safetensors is not a file. Make one with"):
            compare(images, features="nowhere.safetensors")
        save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
        for name in ("other", "broken"):
            with pytest.raises(
                ValueError, match=f"{name}.safetensors was not written by the command train-classifier"
            ):
                compare(images, features=tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"shape \(8, 8, 3\) .* the classifier .* was trained on \(8, 8, 1\)"):
            compare(np.repeat(images, 3, axis=-1))
        with pytest.raises(ValueError, match=r"shape \(4, 4, 1\) .* the classifier .* was trained on \(8, 8, 1\)"):
            compare(images[:, ::2, ::2])
        with pytest.raises(ValueError, match="has labels up to 10, but the classifier .* knows 10 classes"):
            compare(images, labels + 1)
        with pytest.raises(ValueError, match=r"has 1797 images, but labels of shape \(3,\)"):
            compare(images, labels[:3])
        with pytest.raises(ValueError, match="has images of float32 in shape"):
            compare(images.astype(np.float32))
        with pytest.raises(ValueError, match="`--samples` .*nowhere.npz is not a file"):
            compare(images, samples="nowhere.npz")
        np.savez(tmp_path / "unnamed.npz", pixels=images)
        with pytest.raises(ValueError, match=r"has \['pixels'\], but the images must be under `arr_0`"):
            compare(images, reference=tmp_path / "unnamed.npz")
        np.savez(tmp_path / "large.npz", arr_0=np.repeat(images, 2, axis=1))
        with pytest.raises(ValueError, match=r"shape \(8, 8, 1\) .* but the real ones have \(16, 8, 1\)"):
            compare(images, reference=tmp_path / "large.npz")
        with pytest.raises(ValueError, match="images of 8 x 8 pixels, but the real images are .*`--resolution` 16"):
            compare(images, resolution=16)

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("compare --samples a.npz --features b --output c.json", "exactly one of .*`--reference`; got none"),
            (
                "compare --samples a.npz --features b --output c.json --reference d.npz --dataset digits",
                "got dataset, reference",
            ),
            ("compare --samples a.npz --features b --output c.npz --dataset digits", "c.npz must end in .json"),
            ("train-classifier --output c.safetensors", "exactly one of .*; got none"),
            ("train-classifier --output c.pt --dataset digits", "c.pt must end in .safetensors"),
            ("train-classifier --output c.safetensors --dataset fashion-mnist", "needs `--data_root`"),
            ("train-classifier --output c.safetensors --dataset_name x --streaming", "`--streaming` has no fixed set"),
            ("train-classifier --output c.safetensors --dataset digits --unconditional", "nothing to learn"),
        ],
    )
    def test_bad_arguments(self, evaluate, capsys, command, message):
        with pytest.raises(SystemExit):
            evaluate.parse_args(command.split())
        assert re.search(message, capsys.readouterr().err)
