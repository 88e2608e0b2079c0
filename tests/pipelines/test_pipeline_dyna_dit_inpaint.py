# SPDX-License-Identifier: Apache-2.0
"""
`DynaDiTInpaintPipeline` against loops written out by hand, with the paths' formulas; what is kept, bit for bit; and a
tiny model trained in the test, which fills holes with what is around them.
"""

import math

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from diffusers_dyna import (
    DynaDiTInpaintPipeline,
    DynaDiTPipeline,
    DynaDiTTextToImagePipeline,
    FlowMatchODEScheduler,
    FlowMatchSDEScheduler,
)
from diffusers_dyna.training.tasks import make_inpainting

from ..testing_utils import randn
from .dyna_dit_common import (
    TEXT,
    DynaDiTPipelineTests,
    assert_close,
    generators,
    quiet,
    tiny_dit,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
    train_tiny,
)


PATHS = {
    "linear": (lambda s: 1 - s, lambda s: s),
    "gvp": (lambda s: math.cos(math.pi * s / 2), lambda s: math.sin(math.pi * s / 2)),
    "vp": (
        lambda s: math.exp(-19.9 * s * s / 4 - 0.05 * s),
        lambda s: math.sqrt(1 - math.exp(-19.9 * s * s / 2 - 0.1 * s)),
    ),
}


def make_pipeline(scheduler=None, vae=None, trained=False, **overrides) -> DynaDiTInpaintPipeline:
    """With the transformer of a generator, or with one that is given the mask and the masked image."""
    if trained:
        overrides["condition_channels"] = overrides.get("in_channels", 3) + 1
    transformer = tiny_dit(**overrides)
    return quiet(DynaDiTInpaintPipeline(transformer, scheduler or FlowMatchODEScheduler(), vae))


def pictures(*entries: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    return (
        torch.cat([randn(1, channels, size, size, seed=10 + entry) for entry in entries]).mul(0.3).add(0.5).clamp(0, 1)
    )


def square(top: int = 2, left: int = 2, side: int = 4, size: int = 8) -> torch.Tensor:
    mask = torch.zeros(1, size, size)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def paint(pipe, image, mask, *, num_inference_steps=4, output_type="pt", **kwargs) -> torch.Tensor:
    arguments = {"num_inference_steps": num_inference_steps, "output_type": output_type, **kwargs}
    return pipe(image=image, mask_image=mask, **arguments).images


class TestWithoutTraining(DynaDiTPipelineTests):
    pipeline_class = DynaDiTInpaintPipeline
    trained = False

    def make(self, **overrides):
        return make_pipeline(trained=self.trained, **overrides)

    def arguments(self, *entries):
        labels = [entry % 3 for entry in entries]
        return {"image": pictures(*entries), "mask_image": square(1, 2), "class_labels": labels, "guidance_scale": 2.0}

    def test_vae(self):
        """Decoded latents where the mask is, and the image elsewhere."""
        pipe = self.make(vae=tiny_vae(shift_factor=0.3), **self.latent)
        latents = self.draw(pipe, 0, 1)
        images = self.draw(pipe, 0, 1, output_type="pt")
        assert latents.shape == (2, 4, 4, 4)
        with torch.no_grad():
            decoded = pipe.vae.decode(latents / 0.5 + 0.3).sample
        assert_close(images, torch.where(square(1, 2) > 0, (decoded / 2 + 0.5).clamp(0, 1), pictures(0, 1)))


class TestTrained(TestWithoutTraining):
    trained = True


# The loop


@torch.no_grad()
def predict(pipe, sample, t, label, scale, condition=None):
    """Guided by two calls of the transformer."""
    model_input = sample if condition is None else torch.cat([sample, condition], dim=1)
    null = torch.tensor([3])
    output, null_output = (
        pipe.transformer(model_input, t.float(), class_labels=labels).sample[:, :3]
        for labels in (torch.tensor([label]), null)
    )
    return null_output + scale * (output - null_output)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "make_scheduler",
    [
        FlowMatchODEScheduler,
        lambda: FlowMatchODEScheduler(path="gvp"),
        lambda: FlowMatchODEScheduler(path="vp", solver="ab2"),
        FlowMatchEulerDiscreteScheduler,
        DDIMScheduler,
    ],
    ids=["linear", "gvp", "vp-ab2", "diffusers-euler", "ddim"],
)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_loop(make_scheduler, trained, strength):
    """After each step the known part is a * image + b * noise, by formulas of its own; row by row."""
    pipe = make_pipeline(make_scheduler(), trained=trained)
    images, mask, steps = pictures(0, 1), square(), 5
    actual = paint(
        pipe,
        images,
        mask,
        class_labels=[2, 1],
        guidance_scale=2.0,
        num_inference_steps=steps,
        strength=strength,
        generator=generators(0, 1),
        output_type="latent",
    )

    for row, label in enumerate((2, 1)):
        scheduler = make_scheduler()
        sigmas = {"sigmas": [1, 0.8, 0.6, 0.4, 0.2]} if "Euler" in type(scheduler).__name__ else {}
        scheduler.set_timesteps(**(sigmas or {"num_inference_steps": steps}))
        image, noise = 2 * images[row : row + 1] - 1, randn(1, 3, 8, 8, seed=row)

        def noised(t):
            if isinstance(scheduler, DDIMScheduler):
                share = scheduler.alphas_cumprod[int(t)].item()
                return math.sqrt(share) * image + math.sqrt(1 - share) * noise
            a, b = PATHS[scheduler.config.get("path", "linear")]
            return a(t.item() / 1000) * image + b(t.item() / 1000) * noise

        times = scheduler.timesteps if strength == 1 else scheduler.timesteps[2:]
        sample = noise if strength == 1 else noised(times[0])
        condition = torch.cat([mask[None], image * (1 - mask)], dim=1) if trained else None
        for t, next_t in zip(times, [*times[1:], None]):
            sample = scheduler.step(predict(pipe, sample, t, label, 2.0, condition), t, sample).prev_sample
            known = image if next_t is None else noised(next_t)
            sample = mask * sample + (1 - mask) * known
        assert_close(actual[row : row + 1], sample)


@pytest.mark.parametrize(
    "make_scheduler", [lambda: FlowMatchODEScheduler(solver="heun"), FlowMatchHeunDiscreteScheduler]
)
def test_steps_of_two_calls(make_scheduler):
    """The known part is set at the end of a step, not at the stage inside."""
    pipe = make_pipeline(make_scheduler())
    image, mask = pictures(0), square()
    actual = paint(
        pipe, image, mask, class_labels=2, guidance_scale=2.0, generator=generators(0), output_type="latent"
    )
    scheduler, data, noise = make_scheduler(), 2 * image - 1, randn(1, 3, 8, 8)
    scheduler.set_timesteps(4)
    sample, levels = noise, [0.75, 0.5, 0.25, 0.0]
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        levels = [*scheduler.sigmas[2::2].tolist(), 0.0]
    for call, t in enumerate(scheduler.timesteps):
        sample = scheduler.step(predict(pipe, sample, t, 2, 2.0), t, sample).prev_sample
        if call % 2 or call == len(scheduler.timesteps) - 1:
            level = levels[call // 2]
            sample = mask * sample + (1 - mask) * ((1 - level) * data + level * noise)
    assert_close(actual, sample)


# Resampling


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("jump_length, order", [(1, [0, 1, 1, 2, 2, 3, 3, 4, 4]), (2, [0, 1, 2, 3, 2, 3, 4, 4])])
def test_resampling(path, jump_length, order):
    """Euler steps from level to level, and back by (a'/a) x + sqrt(b'^2 - (a'/a)^2 b^2) noise."""
    pipe = make_pipeline(FlowMatchODEScheduler(path=path))
    image, mask = pictures(0), square()
    actual = paint(
        pipe,
        image,
        mask,
        class_labels=2,
        guidance_scale=2.0,
        num_inference_steps=5,
        jump_length=jump_length,
        jump_n_sample=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    a, b = PATHS[path]
    data, generator = 2 * image - 1, torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 8, 8, generator=generator)
    scheduler = FlowMatchODEScheduler(path=path)
    scheduler.set_timesteps(5)
    levels = scheduler.sigmas.tolist()
    sample = noise
    for i, next_i in zip(order, [*order[1:], 5]):
        step = predict(pipe, sample, torch.tensor(1000 * levels[i]), 2, 2.0)
        sample = sample + (levels[i + 1] - levels[i]) * step
        if next_i <= i:
            ratio = a(levels[next_i]) / a(levels[i + 1])
            rest = math.sqrt(b(levels[next_i]) ** 2 - (ratio * b(levels[i + 1])) ** 2)
            sample = ratio * sample + rest * torch.randn(1, 3, 8, 8, generator=generator)
        known = data if next_i == 5 else a(levels[next_i]) * data + b(levels[next_i]) * noise
        sample = mask * sample + (1 - mask) * known
    assert_close(actual, sample)


@pytest.mark.parametrize("path", PATHS)
def test_renoise_has_the_distribution_of_the_path(path):
    """Mean a' and variance b'^2 of what was a * 1 + b * noise, from 100,000 pixels: errors of about 0.3 %."""
    pipe = make_pipeline(FlowMatchODEScheduler(path=path))
    a, b = PATHS[path]
    generator = torch.Generator().manual_seed(0)
    state = a(0.3) + b(0.3) * torch.randn(1, 1, 250, 400, generator=generator)
    back = pipe.renoise(state, torch.tensor(0.3), torch.tensor(0.7), generator)
    assert back.mean().item() == pytest.approx(a(0.7), abs=0.01)
    assert back.std().item() == pytest.approx(b(0.7), rel=0.01)


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda: FlowMatchODEScheduler(solver="heun"),
        lambda: FlowMatchODEScheduler(solver="rk4"),
        FlowMatchSDEScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
    ],
)
def test_resampling_of_other_schedulers(make_scheduler):
    """Each run of steps but the first twice, whole steps at a time."""
    pipe = make_pipeline(make_scheduler())
    times = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args: times.append(args[1].item()))
    arguments = {"class_labels": 2, "generator": torch.Generator().manual_seed(0)}
    plain = paint(pipe, pictures(0), square(), **arguments)
    once, times[:] = list(times), []
    arguments["generator"].manual_seed(0)
    images = paint(pipe, pictures(0), square(), jump_n_sample=2, **arguments)
    handle.remove()
    order = pipe.scheduler.order
    steps = [once[i : i + order] for i in range(0, len(once), order)]
    assert times == [*steps[0], *(time for step in steps[1:] for _ in range(2) for time in step)]
    assert pipe.num_timesteps == len(times)
    assert images.isfinite().all() and (images - plain).abs().max() > 0.01


def test_no_resampling_is_the_plain_run():
    pipe = make_pipeline()
    plain = paint(pipe, pictures(0), square(), class_labels=2, generator=generators(0))
    assert_close(paint(pipe, pictures(0), square(), class_labels=2, generator=generators(0), jump_length=3), plain)


# What the transformer is given


def watch(transformer) -> list[torch.Tensor]:
    seen = []
    transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    return seen


@pytest.mark.parametrize("has_vae", [False, True])
def test_condition_channels_are_those_of_training(has_vae):
    """In each step, in both halves of guidance; the masks are those that training draws."""
    vae = tiny_vae(shift_factor=0.3) if has_vae else None
    pipe = make_pipeline(trained=True, vae=vae, **({"in_channels": 4} if has_vae else {}))
    images = pictures(0, 1, size=16)
    batch = {"sample_indices": [5, 6], "pixel_values": 2 * images - 1}
    _, condition, _ = make_inpainting(7, torch.device("cpu"), vae)(batch)
    masks = make_inpainting(7, torch.device("cpu"))(batch)[1][:, :1]
    seen = watch(pipe.transformer)
    paint(pipe, images, masks, class_labels=[0, 1], guidance_scale=2.0, generator=generators(0, 1))
    assert len(seen) == 4
    channels = pipe.transformer.config.in_channels
    for model_input in seen:
        assert model_input.shape[1] == 2 * channels + 1
        assert_close(model_input[:, channels:], torch.cat([condition, condition]), atol=1e-6)
    assert (seen[0][:, :channels] - seen[-1][:, :channels]).abs().max() > 0.1


@pytest.mark.parametrize("has_vae", [False, True])
def test_masked_image_latents(has_vae):
    """In the place of the image without its hole, which they are made of unless they are given; one for all or for each."""
    config = {"vae": tiny_vae(shift_factor=0.3), "in_channels": 4} if has_vae else {}
    pipe = make_pipeline(trained=True, **config)
    images, mask = pictures(0, 1, size=16), square(4, 4, side=8, size=16)
    arguments = {"class_labels": [0, 1], "guidance_scale": 2.0, "generator": generators(0, 1)}
    expected = paint(pipe, images, mask, **arguments)
    masked = pipe.encode_image((2 * images - 1) * (1 - mask), sample_mode="argmax").detach()
    arguments["generator"] = generators(0, 1)
    assert_close(paint(pipe, images, mask, masked_image_latents=masked, **arguments), expected)

    seen = watch(pipe.transformer)
    other, channels = randn(*masked[:1].shape, seed=7), masked.shape[1]
    arguments["generator"] = generators(0, 1)
    results = paint(pipe, images, mask, masked_image_latents=other, **arguments)
    for model_input in seen:
        assert_close(model_input[:, channels + 1 :], other.expand(4, -1, -1, -1))
    assert (results - expected).abs().max() > 0.01
    arguments |= {"generator": generators(0, 1, 2, 3), "num_images_per_prompt": 2}
    del seen[:]
    paint(pipe, images[:1], mask, masked_image_latents=masked, **arguments)
    assert_close(seen[0][:, channels + 1 :], masked[[0, 0, 1, 1] * 2])


def test_latents_are_composited():
    """With a VAE, what is kept are the latents of the image, the mean of their distribution."""
    vae = tiny_vae(shift_factor=0.3)
    pipe = make_pipeline(vae=vae, in_channels=4)
    images = pictures(0, 1, size=16)
    mask = torch.zeros(16, 16)
    mask[5:10, 5:12] = 1  # of latents of 2 x 2 pixels, those with a painted one
    latents = paint(pipe, images, mask, class_labels=[0, 1], generator=generators(0, 1), output_type="latent")
    with torch.no_grad():
        expected = (vae.encode(2 * images - 1).latent_dist.mean - 0.3) * 0.5
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[2:5, 2:6] = False
    assert_close(latents[:, :, kept], expected[:, :, kept], atol=1e-6)
    assert ((latents - expected)[:, :, ~kept].abs() > 1e-3).float().mean() > 0.9


# What a callback may change


def after(step: int, **changed):
    """A callback that changes tensors after one step."""
    return lambda pipe, i, timestep, tensors: changed if i == step else None


def test_callback_changes_what_the_transformer_is_given():
    """From the next step on, in both halves of guidance; against a run that was given it from the start."""
    pipe = make_pipeline(trained=True)
    images, mask, other = pictures(0, 1), square(), randn(2, 3, 8, 8, seed=7)
    arguments = {"class_labels": [0, 1], "guidance_scale": 2.0, "output_type": "latent"}
    seen = watch(pipe.transformer)
    names = ["latents", "mask", "masked_image_latents"]
    given = []

    def callback(pipeline, step, timestep, tensors):
        given.append({name: tensor.clone() for name, tensor in tensors.items()})
        return {"masked_image_latents": other} if step == 1 else {}

    arguments["callback_on_step_end_tensor_inputs"] = names
    changed = paint(pipe, images, mask, generator=generators(0, 1), callback_on_step_end=callback, **arguments)
    assert [list(tensors) for tensors in given] == [names] * 4
    masked = (2 * images - 1) * (1 - mask)
    for step, (model_input, tensors) in enumerate(zip(seen, given, strict=True)):
        assert_close(model_input[:, 4:], (masked if step < 2 else other).repeat(2, 1, 1, 1))
        assert_close(model_input[:, 3:4], mask.expand(4, 1, 8, 8))
        assert torch.equal(tensors["mask"], mask.expand(2, 1, 8, 8))
        assert_close(tensors["masked_image_latents"], masked if step < 2 else other)
    plain = paint(pipe, images, mask, generator=generators(0, 1), **arguments)
    assert (changed - plain).abs().max() > 0.01
    # what comes back as it was given is no change
    same = paint(pipe, images, mask, generator=generators(0, 1), callback_on_step_end=lambda *a: a[3], **arguments)
    assert_close(same, plain)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_callback_changes_the_mask(trained, in_place):
    """After half of the steps another part is painted: what the transformer is told, what is set, and what is kept."""
    pipe = make_pipeline(trained=trained)
    image, first, second = pictures(0), square(0, 0), square(2, 3)
    seen = watch(pipe.transformer)

    def callback(pipeline, step, timestep, tensors):
        if step == 1 and in_place:
            tensors["mask"].copy_(second[None])
        return {"mask": second[None]} if step == 1 and not in_place else {}

    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["mask"], "class_labels": 2}
    actual = paint(pipe, image, first, generator=generators(0), **arguments)

    scheduler, data, noise = FlowMatchODEScheduler(), 2 * image - 1, randn(1, 3, 8, 8)
    scheduler.set_timesteps(4)
    sample = noise
    for step, (t, level) in enumerate(zip(scheduler.timesteps, (0.75, 0.5, 0.25, 0.0))):
        mask = (first if step < 2 else second)[None]
        condition = torch.cat([mask, data * (1 - first)], dim=1) if trained else None
        if trained:
            assert_close(seen[step][:, 3:], condition)
        sample = scheduler.step(predict(pipe, sample, t, 2, 1.0, condition), t, sample).prev_sample
        sample = mask * sample + (1 - mask) * ((1 - level) * data + level * noise)
    assert_close(actual, (sample / 2 + 0.5).clamp(0, 1))
    kept = (second < 0.5).expand(1, 3, 8, 8)
    assert torch.equal(actual[kept], image[kept])


def test_callback_changes_the_mask_of_latents():
    """Of a VAE: the pixels of the latents that it has in the end come from the decoder, the others are the image's."""
    pipe = make_pipeline(vae=tiny_vae(), in_channels=4)
    image, other = pictures(0, size=16), square(1, 2, side=3)[None]
    callback = after(0, mask=other)
    arguments = {"class_labels": 0, "generator": generators(0), "callback_on_step_end": callback}
    result = paint(pipe, image, square(5, 5, side=5, size=16), **arguments)
    painted = other.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).expand(1, 3, 16, 16) > 0
    assert torch.equal(result[~painted], image[~painted])
    assert (result != image)[painted].float().mean() > 0.99


@pytest.mark.parametrize(
    "trained, changed, message",
    [
        (False, {"mask": torch.ones(2, 1, 8, 8)}, r"`mask` from .* must have shape \(1, 1, 8, 8\), as given, but has"),
        (
            True,
            {"masked_image_latents": torch.ones(1, 4, 8, 8)},
            r"`masked_image_latents` from .* shape \(1, 3, 8, 8\)",
        ),
        (False, {"masked_image_latents": torch.ones(1, 3, 8, 8)}, "returned 'masked_image_latents', but only"),
        (False, {"latents": torch.ones(1, 3, 4, 8)}, r"`latents` from .* must have shape \(1, 3, 8, 8\)"),
    ],
)
def test_wrong_tensors_of_a_callback(trained, changed, message):
    pipe = make_pipeline(trained=trained)
    with pytest.raises(ValueError, match=message):
        paint(pipe, pictures(0), square(), class_labels=0, callback_on_step_end=after(0, **changed))


def test_mask_of_a_crop_cannot_be_changed():
    image, mask = PIL.Image.new("RGB", (16, 16)), PIL.Image.new("L", (16, 16))
    mask.paste(255, (2, 2, 5, 5))
    arguments = {"class_labels": 0, "padding_mask_crop": 1, "output_type": "pil", "height": 8, "width": 8}
    with pytest.raises(ValueError, match="`callback_on_step_end` changed `mask`, but with `padding_mask_crop`"):
        callback = after(0, mask=torch.ones(1, 1, 8, 8))
        paint(make_pipeline(), image, mask, callback_on_step_end=callback, **arguments)


# What is kept


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_known_pixels_come_back_bit_for_bit(trained, channels):
    pipe = make_pipeline(trained=trained, in_channels=channels)
    images = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :3] = torch.tensor([1e-9, 1 / 3, 1.0])
    mask = square()
    kept = (mask < 0.5).expand(channels, 8, 8)
    arguments = {"class_labels": [0, 1], "generator": generators(0, 1), "jump_n_sample": 2}
    pt = paint(pipe, images, mask, **arguments)
    assert torch.equal(pt[:, kept], images[:, kept])
    assert ((pt - images)[:, ~kept].abs() > 1e-3).float().mean() > 0.9
    arrays = paint(pipe, images.permute(0, 2, 3, 1).numpy(), mask[0].numpy(), output_type="np", **arguments)
    assert np.array_equal(arrays.transpose(0, 3, 1, 2)[:, kept.numpy()], images[:, kept].numpy())

    levels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), dtype=np.uint8)
    image = PIL.Image.fromarray(levels.squeeze())
    (result,) = paint(pipe, image, PIL.Image.fromarray(np.uint8(255 * mask[0])), class_labels=0, output_type="pil")
    assert result.mode == image.mode
    pixels = np.asarray(result).reshape(8, 8, channels).transpose(2, 0, 1)
    assert np.array_equal(pixels[kept.numpy()], levels.transpose(2, 0, 1)[kept.numpy()])


@pytest.mark.parametrize("trained", [False, True])
def test_known_pixels_come_back_bit_for_bit_through_a_vae(trained):
    """A mask that cuts latents of 2 x 2 pixels in two, and one that leaves at most one whole: no more changes than asked."""
    pipe = make_pipeline(trained=trained, vae=tiny_vae(shift_factor=0.3), in_channels=4)
    images = pictures(0, 1, size=16)
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, 5:10, 5:12] = 1
    masks[1, :, 1::2, 1::2] = 1
    if not trained:  # which is refused a mask that leaves none
        masks[1, :, :2, :2] = 0
    painted = (masks > 0).expand(2, 3, 16, 16)
    arguments = {"class_labels": [0, 1], "generator": generators(0, 1)}
    results = paint(pipe, images, masks, **arguments)
    assert torch.equal(results[~painted], images[~painted])
    assert (results != images)[painted].float().mean() > 0.99

    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = masks[0, 0].numpy() > 0
    (result,) = paint(pipe, PIL.Image.fromarray(levels), PIL.Image.fromarray(mask), class_labels=0, output_type="pil")
    assert np.array_equal(np.asarray(result)[~mask], levels[~mask])
    assert (np.asarray(result) != levels)[mask].mean() > 0.9


def test_forms_of_images_and_masks():
    """Images of Pillow, arrays and tensors, alone, in a batch and in lists, are the same image."""
    pipe = make_pipeline()
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    array, mask = levels.astype(np.float32) / 255, square()[0]
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    pil_mask = PIL.Image.fromarray(np.uint8(255 * mask))
    expected = paint(pipe, tensor, mask, class_labels=2, generator=generators(0))
    forms = [
        (PIL.Image.fromarray(levels), pil_mask),
        (PIL.Image.fromarray(levels).convert("RGBA"), pil_mask.convert("RGB")),
        ([PIL.Image.fromarray(levels)], [pil_mask]),
        (array, mask.numpy()),
        (array[None], mask.numpy()[..., None]),
        ([array], mask.numpy()[None, ..., None]),
        (tensor[None], mask[None, None]),
        ([tensor], mask[None]),
        (tensor, [mask > 0.5]),
        (tensor, mask * 0.1 + 0.45),  # cut at 0.5
        (tensor, mask * 0.5),  # 0.5 itself is painted
    ]
    for image, mask_image in forms:
        assert_close(paint(pipe, image, mask_image, class_labels=2, generator=generators(0)), expected)
    assert torch.equal(mask, square()[0])  # as it was


def test_how_images_masks_and_labels_are_combined():
    pipe = make_pipeline()
    images, masks = pictures(0, 1), torch.stack([square(), square(0, 0)])
    expected = paint(pipe, images, masks, class_labels=[2, 2], generator=generators(0, 1))
    assert_close(paint(pipe, images, masks, class_labels=2, generator=generators(0, 1)), expected)
    same_image = paint(pipe, images[:1], masks, class_labels=2, generator=generators(0, 1))
    assert_close(same_image[:1], expected[:1])
    assert_close(same_image[1:], paint(pipe, images[:1], masks[1], class_labels=2, generator=generators(1)))
    labels = paint(pipe, images[:1], masks[0], class_labels=[2, 0], generator=generators(0, 1))
    assert_close(labels[:1], expected[:1])
    assert_close(labels[1:], paint(pipe, images[:1], masks[0], class_labels=0, generator=generators(1)))


def test_size():
    """`None` is the size of the image, not that of the transformer; another one is resized to."""
    pipe = make_pipeline()
    image = pictures(0, size=12)
    result = paint(pipe, image, square(size=12), class_labels=2)
    assert result.shape == (1, 3, 12, 12)
    assert torch.equal(result[:, :, :2], image[:, :, :2])
    flat = torch.full((3, 12, 12), 0.7)
    mask = square(0, 0, side=6, size=12)
    small = paint(pipe, flat, mask, class_labels=2, height=8, width=4)
    assert small.shape == (1, 3, 8, 4)
    torch.testing.assert_close(small[:, :, 4:], torch.full((1, 3, 4, 4), 0.7))
    assert (small[:, :, :4, :2] - 0.7).abs().min() > 1e-4


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_padding_mask_crop(mode):
    """A part of the image at the transformer's size, pasted back; elsewhere nothing changes, whatever is transparent."""
    channels = len(mode.rstrip("A"))
    pipe = make_pipeline(in_channels=channels)
    rng = np.random.default_rng(0)
    image = PIL.Image.fromarray(rng.integers(0, 256, (21, 30, 4), dtype=np.uint8)).convert(mode)
    mask = np.zeros((21, 30), dtype=np.uint8)
    mask[9:12, 14:18] = 200
    mask[0, 0] = 100  # below 0.5
    mask_image = PIL.Image.fromarray(mask)
    arguments = {"class_labels": 1, "output_type": "pil", "generator": generators(0)}
    (result,) = paint(pipe, image, mask_image, padding_mask_crop=2, **arguments)
    image = image.convert(mode.rstrip("A"))
    assert result.size == image.size and result.mode == image.mode
    kept = mask < 128
    assert np.array_equal(np.asarray(result)[kept], np.asarray(image)[kept])
    assert not np.array_equal(np.asarray(result)[~kept], np.asarray(image)[~kept])

    # 4 x 3 pixels and a margin of 2 are 8 x 7, made square: 8 x 8 from (12, 7), at its own scale.
    part = (12, 7, 20, 15)
    arguments["generator"] = generators(0)
    (painted,) = paint(pipe, image.crop(part), mask_image.crop(part), **arguments)
    hole = np.s_[9:12, 14:18]
    assert np.array_equal(np.asarray(result)[hole], np.asarray(painted)[2:5, 2:6])


def test_padding_mask_crop_of_16_bits():
    image, mask = PIL.Image.new("RGB", (16, 16)), PIL.Image.fromarray(np.full((16, 16), 1000, dtype=np.uint16))
    with pytest.raises(ValueError, match="`mask_image` is an image of Pillow of mode 'I;16', of more than 8 bits"):
        paint(make_pipeline(), image, mask, class_labels=1, output_type="pil", padding_mask_crop=2)


@pytest.mark.parametrize("trained", [False, True])
def test_strength_keeps_more_of_the_image(trained):
    """The share of the noise that the hole starts from."""
    pipe = make_pipeline(trained=trained)
    image, mask = pictures(0), square()
    changes = []
    for strength in (0.1, 0.5, 1.0):
        result = paint(
            pipe, image, mask, class_labels=2, strength=strength, num_inference_steps=10, generator=generators(0)
        )
        changes.append((result - image).abs().mean().item())
    assert 0 < changes[0] < 0.5 * changes[1] and changes[1] < changes[2]


# Text, and the other pipelines


def make_text_pipeline(**overrides) -> DynaDiTInpaintPipeline:
    parts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    return quiet(DynaDiTInpaintPipeline(tiny_dit(**{**TEXT, **overrides}), FlowMatchODEScheduler(), **parts))


def test_prompts():
    pipe = make_text_pipeline()
    image, mask = pictures(0), square()
    arguments = {"guidance_scale": 2.0, "negative_prompt": "blue"}
    results = paint(pipe, image, mask, prompt=["a red square", "dark"], generator=generators(0, 0), **arguments)
    assert (results[0] - results[1]).abs().max() > 0.01
    assert_close(pipe("dark", image, mask, num_inference_steps=4, output_type="pt", generator=generators(0), **arguments)[0],
                 results[1:])  # fmt: skip
    embeds = pipe.encode_prompt("dark", do_classifier_free_guidance=False)[0]
    results = paint(pipe, image, mask, prompt=["dark"], generator=generators(0))
    assert_close(paint(pipe, image, mask, prompt_embeds=embeds, generator=generators(0)), results)


def test_from_pipe_between_pipelines():
    """The same objects under another pipeline, and back."""
    generate = quiet(DynaDiTPipeline(tiny_dit(), FlowMatchODEScheduler(), id2label={0: "boot", 1: "coat", 2: "bag"}))
    pipe = quiet(DynaDiTInpaintPipeline.from_pipe(generate))
    assert pipe.transformer is generate.transformer and pipe.scheduler is generate.scheduler
    by_name = paint(pipe, pictures(0), square(), class_labels="bag", generator=generators(0))
    assert_close(paint(pipe, pictures(0), square(), class_labels=2, generator=generators(0)), by_name)
    back = DynaDiTPipeline.from_pipe(pipe)
    assert back.transformer is generate.transformer and back.id2label == generate.id2label

    text = make_text_pipeline()
    other = DynaDiTTextToImagePipeline.from_pipe(text)
    again = DynaDiTInpaintPipeline.from_pipe(other)
    for name in ("transformer", "scheduler", "text_encoder", "tokenizer"):
        assert getattr(again, name) is getattr(text, name)


def test_saved_text_pipeline(tmp_path):
    pipe = make_text_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is DynaDiTInpaintPipeline
    arguments = {"prompt": "red", "guidance_scale": 2.0}
    expected = paint(pipe, pictures(0), square(), generator=generators(0), **arguments)
    assert_close(paint(loaded, pictures(0), square(), generator=generators(0), **arguments), expected)


# A trained model


def draw_flat(count: int, generator: torch.Generator) -> torch.Tensor:
    """Images of one grey each, from -0.9 to 0.9."""
    return (1.8 * torch.rand(count, 1, 1, 1, generator=generator) - 0.9).expand(-1, 1, 8, 8)


def draw_masks(count: int, generator: torch.Generator) -> torch.Tensor:
    """A square of 4 x 4 in each."""
    masks = torch.zeros(count, 1, 8, 8)
    for mask, (top, left) in zip(masks, torch.randint(0, 5, (count, 2), generator=generator)):
        mask[:, top : top + 4, left : left + 4] = 1
    return masks


@pytest.fixture(scope="module")
def filling():
    """A model that has learned to fill a square with the grey around it."""

    def draw(count, generator):
        images, masks = draw_flat(count, generator), draw_masks(count, generator)
        return images, torch.cat([masks, images * (1 - masks)], dim=1), {}

    return quiet(DynaDiTInpaintPipeline(train_tiny(draw, condition_channels=2), FlowMatchODEScheduler()))


@pytest.fixture(scope="module")
def drawing():
    """A model that has learned to draw images of one grey, and knows nothing of masks."""
    transformer = train_tiny(lambda count, generator: (draw_flat(count, generator), None, {}))
    return quiet(DynaDiTInpaintPipeline(transformer, FlowMatchODEScheduler()))


@pytest.mark.parametrize("name, jump_n_sample", [("filling", 1), ("drawing", 1), ("drawing", 4)])
def test_holes_are_filled_with_what_is_around_them(request, name, jump_n_sample):
    """
    Image and mask: the grey of the hole follows the image, and the hole is where the mask is. Without either, the mean
    error would be that of two draws from [0.05, 0.95], 0.3.
    """
    pipe = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(1)
    images, masks = draw_flat(16, generator) / 2 + 0.5, draw_masks(16, generator)
    spoiled = torch.where(masks > 0, 1 - images.round(), images)  # what is under the mask must not be seen
    results = paint(
        pipe, spoiled, masks, num_inference_steps=10, jump_n_sample=jump_n_sample, generator=generators(*range(16))
    )
    errors = ((results - images).abs() * masks).sum(dim=(1, 2, 3)) / 16
    assert errors.mean() < 0.1
    assert torch.equal(results * (1 - masks), images * (1 - masks))


def test_resampling_fits_the_hole_to_what_is_known(drawing):
    generator = torch.Generator().manual_seed(1)
    images, masks = draw_flat(16, generator) / 2 + 0.5, draw_masks(16, generator)
    errors = []
    for jump_n_sample in (1, 4):
        results = paint(
            drawing,
            images,
            masks,
            num_inference_steps=10,
            jump_n_sample=jump_n_sample,
            generator=generators(*range(16)),
        )
        errors.append(((results - images).abs() * masks).sum().item())
    assert errors[1] < 0.7 * errors[0]


# Bad input


PIL_IMAGE, PIL_MASK = PIL.Image.new("RGB", (8, 8)), PIL.Image.new("L", (8, 8), 255)
PIL_MASK.paste(0, (0, 0, 8, 4))
PIL_SQUARE = PIL.Image.new("L", (8, 8))
PIL_SQUARE.paste(255, (2, 2, 5, 5))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"mask_image": square(size=10)},
            "`image` and `mask_image` must have the same height and width, but are 8 x 8 and 10 x 10",
        ),
        (
            {"image": PIL_IMAGE, "mask_image": PIL_MASK.resize((8, 6)), "padding_mask_crop": 1, "output_type": "pil"},
            "must have the same height and width, but are 8 x 8 and 6 x 8",
        ),
        (
            {"image": pictures(0) * 255},
            r"`image` must have values in \[0, 1\], but they are in .* Divide bytes by 255",
        ),
        ({"image": pictures(0) * 2 - 1}, r"`image` must have values in \[0, 1\].* shift what is in \[-1, 1\] by"),
        ({"image": pictures(0) * float("nan")}, r"`image` must have values in \[0, 1\], but they are in \[nan, nan\]"),
        ({"mask_image": square() * 255}, r"`mask_image` must have values in \[0, 1\], but they are in \[0, 255\]"),
        (
            {"mask_image": torch.ones(3, 3, 8, 8)},
            r"`mask_image` must have shape .* with 1 channels, .* \(3, 3, 8, 8\)",
        ),
        ({"image": torch.rand(1, 4, 8, 8)}, r"`image` must have shape \(channels, height, width\) with 3 channels"),
        ({"image": np.ones((8, 8), dtype=np.float32)}, r"`image` must have shape \(height, width, channels\) with 3"),
        ({"image": [pictures(0), pictures(1, size=6)]}, "`image` has images of several sizes: 6 x 6, 8 x 8"),
        ({"mask_image": square() * 0}, "`mask_image` 0 is empty .at 8 x 8.*: there is nothing to paint"),
        ({"mask_image": square() * 0.4}, "`mask_image` 0 is empty"),
        (
            {"mask_image": torch.stack([square(), torch.ones(1, 8, 8)]), "class_labels": [0, 1]},
            "`mask_image` 1 covers all .*use DynaDiTPipeline or DynaDiTTextToImagePipeline; .* DynaDiTImg2ImgPipeline",
        ),
        (
            {"image": PIL_IMAGE, "mask_image": PIL_SQUARE, "padding_mask_crop": 0, "output_type": "pil"},
            "`mask_image` 0 covers all .* or the margin of `padding_mask_crop` larger",
        ),
        (
            {
                "image": PIL_IMAGE,
                "mask_image": PIL_MASK.point(lambda value: 0),
                "padding_mask_crop": 0,
                "output_type": "pil",
            },
            "`mask_image` 0 is empty",
        ),
        (
            {"mask_image": torch.stack([square()] * 3), "image": pictures(0, 1)},
            "one mask for all images or one for each of the 2, but has 3",
        ),
        (
            {"image": pictures(0, 1), "class_labels": [0, 1, 2]},
            "as many of each, or one for all, but there are: `image` 2, `class_labels` 3",
        ),
        (
            {"image": pictures(0, size=9), "mask_image": square(size=9)},
            r"must be divisible by 2 .* are 9 and 9. The nearest valid size is 10 and 10",
        ),
        ({"height": 8, "width": 13}, r"are 8 and 13. The nearest valid size is 8 and 14"),
        ({"strength": 1.5}, r"`strength`=1.5 must be in \(0, 1\]"),
        ({"strength": -0.1}, r"`strength`=-0.1 must be in \(0, 1\]"),
        ({"strength": 0.0}, r"`strength`=0.0 must be in \(0, 1\]. .* 0 would paint nothing"),
        (
            {"padding_mask_crop": 4, "output_type": "pil"},
            "`padding_mask_crop` needs a single image of Pillow as `image`, but it is a Tensor",
        ),
        (
            {"image": [PIL_IMAGE, PIL_IMAGE], "mask_image": PIL_MASK, "padding_mask_crop": 4, "output_type": "pil"},
            "single image of Pillow as `image`, but it is a list",
        ),
        (
            {"image": PIL_IMAGE, "mask_image": PIL_MASK, "padding_mask_crop": 4},
            "`padding_mask_crop` .* `output_type` must be 'pil', but is 'latent'",
        ),
        (
            {"image": PIL_IMAGE, "mask_image": PIL_MASK, "padding_mask_crop": -1, "output_type": "pil"},
            "`padding_mask_crop`=-1 must be a whole number, at least 0",
        ),
        (
            {"image": PIL_IMAGE, "mask_image": PIL_MASK, "padding_mask_crop": 4.5, "output_type": "pil"},
            "`padding_mask_crop`=4.5 must be a whole number, at least 0",
        ),
        (
            {"masked_image_latents": torch.ones(1, 3, 8, 8)},
            "`masked_image_latents` is what a transformer trained for inpainting is given, but this one is not",
        ),
        (
            {"callback_on_step_end_tensor_inputs": ["masked_image_latents"]},
            "`masked_image_latents` is what .* Leave it",
        ),
        ({"jump_length": 0}, "`jump_length`=0 must be a whole number, at least 1"),
        ({"jump_n_sample": 1.5}, "`jump_n_sample`=1.5 must be a whole number, at least 1"),
        ({"prompt": "red"}, r"`prompt` or one of its kind was given, but the transformer has no text conditioning"),
    ],
)
def test_bad_input(arguments, message):
    pipe = make_pipeline()
    given = {"image": pictures(0), "mask_image": square(), "class_labels": 0, "num_inference_steps": 3}
    with pytest.raises(ValueError, match=message):
        pipe(**{**given, "output_type": "latent", **arguments})


def test_masked_image_latents_of_another_shape():
    pipe, given = make_pipeline(trained=True), {"class_labels": [0, 1, 2]}
    message = r"`masked_image_latents` must have shape \(batch_size, 3, 8, 8\), but has shape \(1, 3, 8, 4\)"
    with pytest.raises(ValueError, match=message):
        paint(pipe, pictures(0), square(), masked_image_latents=torch.ones(1, 3, 8, 4), **given)
    for latents in (torch.ones(1, 3, 8, 8).numpy(), [torch.ones(3, 8, 8)]):
        with pytest.raises(TypeError, match="`masked_image_latents` must be a tensor, but is (ndarray|list)"):
            paint(pipe, pictures(0), square(), masked_image_latents=latents, **given)
    with pytest.raises(ValueError, match="`image` 1, `masked_image_latents` 2, `class_labels` 3"):
        paint(pipe, pictures(0), square(), masked_image_latents=torch.ones(2, 3, 8, 8), **given)


def test_no_image():
    with pytest.raises(
        TypeError, match="`image` was not given. Give an image of Pillow, an array or a tensor as `image=`"
    ):
        make_pipeline()(mask_image=square())
    with pytest.raises(TypeError, match="`mask_image` was not given"):
        make_pipeline()(image=pictures(0))
    with pytest.raises(
        TypeError, match="`prompt` must be a text .* first argument of a call: give an image as `image=`"
    ):
        make_pipeline()(pictures(0), square())
    with pytest.raises(TypeError, match="`mask_image` must be .* but is str"):
        make_pipeline()(image=pictures(0), mask_image="mask.png")
    with pytest.raises(TypeError, match="`image` must be .* but is list of .*'Tensor', 'ndarray'"):
        make_pipeline()(image=[pictures(0), np.zeros((8, 8, 3))], mask_image=square())


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda: FlowMatchODEScheduler(solver="abm3"),
        DDIMScheduler,
        lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
)
def test_resampling_needs_steps_without_memory(make_scheduler):
    pipe = make_pipeline(make_scheduler(), learn_sigma=False)
    with pytest.raises(ValueError, match="`jump_n_sample`=2 .* Use FlowMatchODEScheduler with `solver` in .'euler'"):
        paint(pipe, pictures(0), square(), class_labels=0, jump_n_sample=2)
    result = paint(pipe, pictures(0), square(), class_labels=0)
    kept = (square() < 0.5).expand(1, 3, 8, 8)
    assert torch.equal(result[kept], pictures(0)[kept])


def test_mask_that_is_lost_at_the_size_that_is_painted():
    """That of the pixels: one of them is enough for a latent of 2 x 2."""
    pipe = make_pipeline(vae=tiny_vae(), in_channels=4)
    image, mask = pictures(0, size=16), torch.zeros(16, 16)
    mask[5, 5] = 1
    changed = paint(pipe, image, mask, class_labels=0) != image
    assert changed[0, :, 5, 5].all() and changed.sum() == 3
    with pytest.raises(ValueError, match="`mask_image` 0 is empty .at 8 x 8, the size that is painted"):
        paint(pipe, image, mask, class_labels=0, height=8, width=8)
    with pytest.raises(ValueError, match="`mask_image` 0 covers all .at 16 x 16"):
        paint(pipe, image, torch.ones(16, 16), class_labels=0)


def test_mask_that_covers_every_latent():
    """Refused where the image would not be seen: not if a transformer is given it, nor if it is the start."""
    vae, image = tiny_vae(), pictures(0, 1, size=16)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 4:8, 4:8] = 1
    mask[1, :, ::2, ::2] = 1  # a pixel of each latent of 2 x 2
    pipe = make_pipeline(vae=vae, in_channels=4)
    with pytest.raises(
        ValueError, match="`mask_image` 1 covers every latent .at 16 x 16.* in whole blocks of 2 x 2 .* below 1"
    ):
        paint(pipe, image, mask, class_labels=[0, 1])
    kept = (mask < 0.5).expand_as(image)
    trained = make_pipeline(trained=True, vae=vae, in_channels=4)
    for result in (
        paint(pipe, image, mask, class_labels=[0, 1], strength=0.5),
        paint(trained, image, mask, class_labels=[0, 1]),
    ):
        assert torch.equal(result[kept], image[kept])
    mask[1, :, :2, :2] = 0  # one latent is known
    paint(pipe, image, mask, class_labels=[0, 1])


def test_transformers_of_other_tasks():
    upscaler = tiny_dit(condition_channels=3, noise_level_conditioning=True)
    with pytest.raises(
        ValueError, match="`transformer` was made for another task .upscale.* Use DynaDiTUpscalePipeline"
    ):
        DynaDiTInpaintPipeline(upscaler, FlowMatchODEScheduler())
    with pytest.raises(ValueError, match="another task .inpaint.* Use DynaDiTInpaintPipeline"):
        DynaDiTPipeline(tiny_dit(condition_channels=4), FlowMatchODEScheduler())
    with pytest.raises(
        ValueError, match="`condition_channels`=2, but for the task inpaint with `in_channels`=3 there must be 4"
    ):
        DynaDiTInpaintPipeline(tiny_dit(condition_channels=2), FlowMatchODEScheduler())
