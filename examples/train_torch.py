"""A PyTorch training loop on one GPU that nobody else has.

    pip install torch
    gpupool-sync serve --simulate 4xA100 --port 8001 &    # not needed on a machine with GPUs
    export GPU_SERVICE_ENDPOINTS=http://127.0.0.1:8001
    python examples/train_torch.py

On simulated GPUs it computes on the CPU.
"""

from __future__ import annotations

import torch

from gpupool_sync import GPUPool


def train(device: torch.device, check) -> float:
    torch.manual_seed(0)
    inputs = torch.randn(256, 8, device=device)
    targets = inputs.sum(dim=1, keepdim=True)
    model = torch.nn.Linear(8, 1).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(100):
        check()  # raises LeaseLost: better to stop than to compute on a GPU that somebody else has now
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    with GPUPool() as pool, pool.gpu() as gpu:
        name = gpu.activate()  # before anything touches CUDA; torch may be imported already
        device = torch.device(name if torch.cuda.is_available() else "cpu")
        print(f"{gpu.global_gpu_id} as {device}: loss {train(device, gpu.check):.6f}")


if __name__ == "__main__":
    main()
