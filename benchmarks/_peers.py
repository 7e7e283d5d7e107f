"""The same methods as other libraries have them, on the same model."""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Any

from _llama import LINEARS, copy_of
from torch import nn

Maker = Callable[[nn.Module, str, int | None, dict[str, Any]], nn.Module]


def _configs(rank: Any) -> dict[str, Callable[..., Any]]:
    """Return peft's configurations by the name of our structure; where ours has no rank, peft's own sizes."""
    import peft

    lora: dict[str, Any] = {"r": rank, "lora_alpha": rank}
    return {
        "lora": lambda **o: peft.LoraConfig(**lora, **o),
        "dora": lambda **o: peft.LoraConfig(**lora, use_dora=True, **o),
        "hira": lambda **o: peft.HiraConfig(r=rank, **o),
        "gralora": lambda **o: peft.GraloraConfig(r=rank, gralora_k=2, hybrid_r=0, **o),
        "vera": lambda **o: peft.VeraConfig(r=rank, save_projection=False, **o),
        "hra": lambda **o: peft.HRAConfig(r=rank, **o),
        "loha": lambda **o: peft.LoHaConfig(r=rank, alpha=rank, **o),
        "lokr": lambda **o: peft.LoKrConfig(r=rank, alpha=rank, **o),
        "randlora": lambda **o: peft.RandLoraConfig(
            r=rank, randlora_alpha=20 * rank if rank else 0, save_projection=False, **o
        ),
        "oft": lambda **o: peft.OFTConfig(oft_block_size=32, r=0, use_cayley_neumann=False, **o),
        "boft": lambda **o: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, **o),
        "miss": lambda **o: peft.MissConfig(r=rank, **o),
        "bone": lambda **o: peft.MissConfig(r=rank, init_weights="bat", **o),
        "uni-lora": lambda **o: peft.UniLoraConfig(r=rank, theta_d_length=23040, **o),
    }


def peft_model(model: nn.Module, method: str, rank: int | None, options: dict[str, Any]) -> nn.Module:
    """Adapt a copy with peft.

    Raises:
        KeyError: peft has no such method.
    """
    import peft

    make, given = _configs(rank)[method], dict(options)
    if "dropout" in given:
        given["lora_dropout"] = given.pop("dropout")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = make(target_modules=list(LINEARS), **given)
        adapted: nn.Module = peft.get_peft_model(copy_of(model), config)
        return adapted.train()


LYCORIS: dict[str, dict[str, Any]] = {
    "loha": {},
    "lokr": {},
    "oft": {"algo": "diag-oft", "linear_dim": 32},  # its size is that of the blocks
    "boft": {"linear_dim": 4},
}


def lycoris_model(model: nn.Module, method: str, rank: int | None, options: dict[str, Any]) -> nn.Module:
    """Adapt a copy with LyCORIS, which replaces the forwards of the layers.

    Raises:
        KeyError: LyCORIS has no such method, or is not installed.
    """
    given = {"algo": method, "linear_dim": rank, **LYCORIS[method], **options}
    if importlib.util.find_spec("lycoris") is None:
        raise KeyError("lycoris is not installed")
    logging.disable(logging.WARNING)
    from lycoris import create_lycoris  # type: ignore[import-not-found]

    adapted = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    network = create_lycoris(adapted.model.layers, 1.0, linear_alpha=given["linear_dim"], **given)  # type: ignore[union-attr]
    network.apply_to()
    logging.disable(logging.NOTSET)
    adapted.lycoris = network
    return adapted.train()


PEERS: dict[str, Maker] = {"peft": peft_model, "lycoris": lycoris_model}
