"""Averages over prompts: weighted by how many queries were read, with the standard error of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr


def pool(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """The mean of every variable over the prompts.

    With `<var>_count` c_p (queries read): `m = sum c_p m_p / sum c_p`, and with `<var>_sem` the variance of all queries
    is put together from within and between the prompts, `S = sum (c_p - 1) c_p sem_p^2 + c_p (m_p - m)^2`, `sem^2 = S /
    (c (c - 1))`. Without a count every prompt where the value is known weighs the same, and the standard error is that
    of the mean over prompts. Places no prompt has stay nan.
    """
    known = dict.fromkeys(str(name) for part in parts for name in part.data_vars)
    pooled: dict[str, xr.DataArray] = {}
    for name in known:
        stem = name.removesuffix("_count").removesuffix("_sem")
        if stem != name and stem in known:
            continue
        chosen = [part for part in parts if name in part]
        mean = xr.concat([part[name] for part in chosen], "prompt", join="outer", coords="minimal", compat="override")
        if f"{name}_count" in known:
            count = _join(chosen, f"{name}_count").fillna(0)
            sem = _join(chosen, f"{name}_sem") if f"{name}_sem" in known else xr.zeros_like(mean)
            pooled |= _weighted(name, mean.astype(float), count.astype(float), sem.astype(float))
        else:
            mean = mean.astype(float)
            number = mean.notnull().sum("prompt")
            spread = mean.std("prompt", ddof=1) if len(chosen) > 1 else xr.full_like(mean.isel(prompt=0), np.nan)
            pooled[name] = mean.mean("prompt")
            pooled[f"{name}_count"] = number
            pooled[f"{name}_sem"] = spread / np.sqrt(number.where(number > 1))
    return xr.Dataset(pooled)


def _join(parts: list[xr.Dataset], name: str) -> xr.DataArray:
    return xr.concat([part[name] for part in parts], "prompt", join="outer", coords="minimal", compat="override")


def _weighted(name: str, mean: xr.DataArray, count: xr.DataArray, sem: xr.DataArray) -> dict[str, xr.DataArray]:
    count = count.where(mean.notnull(), 0)
    total = count.sum("prompt")
    middle = (mean.fillna(0) * count).sum("prompt") / total.where(total > 0)
    within = ((count - 1).clip(min=0) * count * sem.fillna(0) ** 2).sum("prompt")
    between = (count * (mean.fillna(0) - middle) ** 2).sum("prompt")
    error = np.sqrt((within + between) / (total * (total - 1)).where(total > 1))
    return {name: middle, f"{name}_count": total, f"{name}_sem": error}
