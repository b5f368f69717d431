"""What runs on a GPU, where there is one: `python -m pytest tests/gpu`.

Elsewhere every test here is skipped, and says what is missing. The part of `gpuremote.torch` in C++
and the one in Python are a run each:

    GPUREMOTE_TORCH_TIER=cpp python -m pytest tests/gpu
    GPUREMOTE_TORCH_TIER=python python -m pytest tests/gpu/test_torch.py
"""
