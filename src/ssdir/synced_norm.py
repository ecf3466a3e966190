"""BatchNorm over the images of all processes, on any device.

torch's own SyncBatchNorm takes tensors of an accelerator only. This one asks nothing but an all-reduce, so that runs of
several processes on CPUs (gloo) and GPUs (NCCL) are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """As ``nn.BatchNorm2d`` of the images of all processes together; every process must call it equally often.

    In eval mode, and without a process group, it is ``nn.BatchNorm2d``. Statistics are taken and
    applied in the type of its parameters, float32 as a rule.
    """

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            values = input.to(self.weight.dtype)
            n = values.numel() // values.shape[1]
            variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
            mean, variance, total = combined(mean, variance, n)
            self._follow(mean.detach(), variance.detach(), total.detach())
            scale = self.weight * (variance + self.eps).rsqrt()
            shift = self.bias - mean * scale
            normalised = torch.addcmul(shift[:, None, None], values, scale[:, None, None])
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Float[Tensor, " c"], variance: Float[Tensor, " c"], n: Float[Tensor, ""]) -> None:
        """The running statistics take in those of a batch of ``n`` values."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        self.num_batches_tracked.add_(1)


@torch.compiler.disable
def combined(
    mean: Float[Tensor, " c"], variance: Float[Tensor, " c"], n: int
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, ""]]:
    """Mean, variance (both over all values) and number of the values of all processes, from those of this one's.

    Each process puts its own into a row of a table of zeros, and the sum of these is the table of all: one all-reduce
    is enough, and no digits cancel, as they do in a mean of squares less a square of means.
    """
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    own = torch.cat([mean, variance, mean.new_full((1,), n)])
    before, after = own.new_zeros(rank, len(own)), own.new_zeros(processes - rank - 1, len(own))
    table = _Summed.apply(torch.cat([before, own[None], after]))
    means, variances, counts = table.split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    share = counts / total
    whole = (share * means).sum(0)
    return whole, (share * (variances + (means - whole).square())).sum(0), total


class _Summed(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        total = slope.contiguous().clone()
        distributed.all_reduce(total)
        return total


def sync_batch_norm(module: nn.Module) -> None:
    """Replace every ``nn.BatchNorm2d`` inside a module by one over all processes, with the same parameters, buffers and
    names."""
    for parent in list(module.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is nn.BatchNorm2d:
                synced = SyncedBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                synced.weight, synced.bias = norm.weight, norm.bias
                for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                    synced.register_buffer(buffer, getattr(norm, buffer))
                synced.train(norm.training)
                setattr(parent, name, synced)
