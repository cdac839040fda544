"""What a result is stamped with."""

import torch
from safetensors.torch import save_file

from recipes.comparison.stamp import name_with_digest


def test_a_folder_is_told_by_its_weights_and_a_hub_id_by_its_name(tmp_path):
    names = []
    for value in (1.0, 1.0, 2.0):
        save_file({"weight": torch.full((2,), value)}, tmp_path / "model.safetensors")
        names.append(name_with_digest(str(tmp_path)))
    assert names[0] == names[1] != names[2]
    assert names[0].startswith(f"{tmp_path.name} ")
    assert name_with_digest("org/model") == "org/model"
