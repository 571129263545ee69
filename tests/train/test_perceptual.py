import pytest
import torch
from safetensors.torch import save_file

from cogvx.models.checkpoint import CheckpointError
from cogvx.train.perceptual import VGG16, ConvFeatures, PerceptualDistance


def clip(*pixels: float) -> torch.Tensor:  # a red-green-blue pixel a frame, [1, 3, T, 1, 1]
    return torch.tensor(pixels).view(1, -1, 3, 1, 1).transpose(1, 2)


def test_the_distance_is_a_hand_worked_value():
    # The features are the pixels in [0, 1] and, in a second layer, twice the first two of them.
    distance = PerceptualDistance(
        lambda x: [x, 2 * x[:, :2]], [torch.tensor([1.0, 10.0, 100.0]), torch.tensor([5.0, 7.0])], (0, 0, 0), (1, 1, 1)
    )
    output, video = clip(1.0, -1.0, -1.0), clip(0.2, 0.6, -1.0)  # (1, 0, 0) and (0.6, 0.8, 0), both of length 1
    expected = (0.4**2 + 10 * 0.8**2) + (5 * 0.4**2 + 7 * 0.8**2)
    assert distance(output, video).item() == pytest.approx(expected, rel=1e-5)
    both = distance(clip(1.0, -1.0, -1.0, 0.0, 0.0, 0.0), clip(0.2, 0.6, -1.0, 0.0, 0.0, 0.0))
    assert both.item() == pytest.approx(expected / 2, rel=1e-5)  # a mean over frames
    scaled = PerceptualDistance(lambda x: [x], None, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    assert scaled(clip(0.6, 0.4, 0.0), clip(1.0, 0.0, 0.0)).item() == pytest.approx(0.4**2 + 0.8**2, rel=1e-5)


def test_features_that_are_all_zero_give_no_nan():
    output = clip(0.5, 0.5, 0.5).requires_grad_()
    PerceptualDistance(lambda x: [x.clamp(max=0)], None, (0, 0, 0), (1, 1, 1))(output, clip(0.1, 0.2, 0.3)).backward()
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_random_features_see_what_pixels_do_and_never_learn():
    distance = PerceptualDistance(ConvFeatures.random(0, ((4,), (8, 8))))
    video = torch.rand(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noisy = (video + 0.3 * torch.randn(video.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
    loss = distance(noisy, video)
    loss.backward()
    assert distance(video, video) == 0 and loss > 0 and noisy.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())
    assert torch.equal(loss, PerceptualDistance(ConvFeatures.random(0, ((4,), (8, 8))))(noisy, video))


def test_a_vgg_by_torchvisions_names_and_its_lpips_weights_are_read(tmp_path):
    wanted = ConvFeatures()
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    stored = {f"features.{i}.{n}": p.data for i, c in zip(places, wanted.convs, strict=True)
              for n, p in c.named_parameters()}  # fmt: skip
    save_file(stored | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    linear = [torch.rand(1, block[-1], 1, 1) for block in VGG16]
    save_file({f"lin{i}.model.1.weight": w for i, w in enumerate(linear)}, tmp_path / "lpips.safetensors")
    read, video = PerceptualDistance.from_folder(tmp_path), torch.rand(2, 1, 3, 1, 16, 16) * 2 - 1
    assert torch.equal(read(*video), PerceptualDistance(wanted, [w.flatten() for w in linear])(*video))
    del stored["features.28.bias"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is no VGG-16: features\.28\.bias must be \[512\]"):
        PerceptualDistance.from_folder(tmp_path)


def test_a_network_of_transformers_and_its_picture_statistics_are_read(tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

    configs = (
        (ResNetModel, ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")),
        (Dinov2Model, Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)),
    )
    for i, (kind, config) in enumerate(configs):
        model, folder = kind(config).eval(), tmp_path / str(i)
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 2, 4]}')
        read, video = PerceptualDistance.from_folder(folder), torch.rand(2, 1, 3, 1, 28, 28) * 2 - 1
        wanted = PerceptualDistance(
            lambda x, m=model: m(x, output_hidden_states=True).hidden_states, None, (0.5, 0.5, 0.5), (1, 2, 4)
        )
        with torch.no_grad():
            assert torch.equal(read(*video), wanted(*video)) and read(*video) > 0


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is no backbone"):
        PerceptualDistance.from_folder(tmp_path)
