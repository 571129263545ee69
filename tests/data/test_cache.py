import torch

from cogvx.data.cache import Cache


def test_what_was_computed_is_read_again_unless_its_key_or_the_file_has_changed(tmp_path):
    calls = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.full((2,), float(len(calls)))}

    cache = Cache(tmp_path / "cache")
    assert cache.get("text", {"caption": "a"}, compute)["x"][0] == 1
    assert Cache(tmp_path / "cache").get("text", {"caption": "a"}, compute)["x"][0] == 1
    assert cache.get("text", {"caption": "b"}, compute)["x"][0] == 2
    assert cache.get("latents", {"caption": "a"}, compute)["x"][0] == 3
    file = min((tmp_path / "cache").glob("latents-*"))
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.get("latents", {"caption": "a"}, compute)["x"][0] == 4
    assert cache.computed == 4
