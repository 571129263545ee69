"""Packed samples against each of them alone."""

import pytest
import torch

from cogvx.config import TransformerConfig
from cogvx.models.packed import Sample, forward_packed
from cogvx.models.transformer import ExpertTransformer

KINDS = {
    "sincos": {},
    "rope": {"use_rotary_positional_embeddings": True},
    "learned": {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 32},
}
# Latent frames, height and width, text tokens, timestep: clips of several sizes and lengths, a picture, no text.
SIZES = [(4, 8, 6, 5, 999), (2, 4, 4, 8, 0), (2, 4, 10, 3, 500), (6, 2, 2, 1, 501)]


def model_of(kind: str, dtype: torch.dtype) -> ExpertTransformer:
    config = TransformerConfig(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, time_embed_dim=32,
        text_embed_dim=12, max_text_seq_length=8, sample_width=8, sample_height=8, sample_frames=17, **KINDS[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    model = ExpertTransformer(config).init_for_training()
    for parameter in model.parameters():  # nothing at zero, so that every gradient is one
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model.to(dtype)


def samples_of(dtype: torch.dtype, sizes=SIZES) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for t, h, w, num_text, timestep in sizes:
        latents, text = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, t, h, w), (num_text, 12)))
        samples.append(Sample(latents, text, timestep))
    return samples


def loss_and_gradients(model, samples, predict) -> list[torch.Tensor]:
    """The mean over samples of a loss, and its gradients, of the inputs too."""
    inputs = [x.clone().requires_grad_() for sample in samples for x in sample[:2]]
    given = [Sample(*inputs[2 * i : 2 * i + 2], s.timestep) for i, s in enumerate(samples)]
    model.zero_grad()
    loss = torch.stack([(y - s.latents.detach().flip(0)).square().mean()
                        for y, s in zip(predict(given), samples, strict=True)]).mean()  # fmt: skip
    loss.backward()
    return [loss.detach(), *(x.grad for x in (*inputs, *model.parameters()))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_loss_and_gradients_are_those_of_the_samples_alone(kind, dtype, limit):
    model, samples = model_of(kind, dtype), samples_of(dtype)
    packed = loss_and_gradients(model, samples, lambda given: forward_packed(model, given))
    alone = loss_and_gradients(
        model,
        samples,
        lambda given: [model(s.latents[None], s.text[None], torch.tensor([s.timestep]))[0] for s in given],
    )
    # Without rotations the bias of the norm of k changes nothing: its gradient is a rounding error, and no measure.
    least = 1e-3 * max(theirs.norm() for theirs in alone[1:])
    again = loss_and_gradients(model, samples, lambda given: forward_packed(model, given, checkpointing=True))
    for found in (packed, again):
        errors = [((a - b).norm() / b.norm().clamp(min=least)).item() for a, b in zip(found, alone, strict=True)]
        assert max(errors) <= limit, max(errors)


def test_what_one_sample_holds_changes_no_other():
    model, samples = model_of("rope", torch.float64), samples_of(torch.float64)
    changed = [samples[0]._replace(latents=samples[0].latents + 1, timestep=3), *samples[1:]]
    with torch.no_grad():
        before, after = forward_packed(model, samples), forward_packed(model, changed)
    assert not torch.allclose(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def test_under_autocast_as_alone():
    model, samples = model_of("rope", torch.float32), samples_of(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed = forward_packed(model, samples)
        alone = [model(s.latents[None], s.text[None], torch.tensor([s.timestep]))[0] for s in samples]
    for ours, theirs in zip(packed, alone, strict=True):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() / theirs.norm() < 0.02


def test_bad_samples_are_named():
    model = model_of("rope", torch.float32)
    with pytest.raises(ValueError, match="samples is empty"):
        forward_packed(model, [])
    with pytest.raises(ValueError, match="latents have height 3, which is no multiple of 2"):
        forward_packed(model, samples_of(torch.float32, [(1, 3, 4, 2, 0)]))
