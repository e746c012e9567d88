"""CUDA kernels without a GPU: the sources of csrc/cuda compiled for the CPU, as a Python module. See build.py."""
