"""Where arithmetic runs, by the name that torch gives it."""

from __future__ import annotations

from gradmatch.estimators.errors import GradmatchError


def check_device(name: str) -> None:
    """Refuse what torch cannot compute on here; "cpu" is known without asking torch.

    Raises:
        ValueError: no device's name, or a device that is not there; those that are there are named.

    Example:
        >>> check_device("cpu")
        >>> check_device("gpu")
        Traceback (most recent call last):
        ...
        ValueError: device is 'gpu', which torch does not know (...); here are: cpu...
    """
    if name == "cpu":
        return
    import torch

    try:
        if torch.empty(1, device=name).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was built without it
        reason = str(error).split("\n")[0]
        known = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise GradmatchError(
            f"device is {name!r}, which torch does not know ({reason}); here are: {', '.join(known)}",
            "bad_setting",
            name,
        ) from None
