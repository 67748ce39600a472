"""How libraries say that memory ran out. Only their text says so: many report it as an internal error, or abort."""

from __future__ import annotations

_MARKS = (
    "out of memory",
    "out_of_memory",  # CUDA_ERROR_OUT_OF_MEMORY
    "outofmemory",  # cudaErrorOutOfMemory
    "resource_exhausted",
    "_alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED; cuDNN, cuSOLVER and cuFFT have the same
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "resource allocation failed",  # cuBLAS in words
    "failed to allocate",
    "dst tensor is not initialized",  # TensorFlow, when a copy to the GPU finds no room there
    "std::bad_alloc",
)

_MARKS_OF_LIBRARIES = (
    "cublas_status_not_initialized",
    "cudnn_status_not_initialized",
    "cusolver_status_not_initialized",
    "could not create cudnn handle",
    "failed to create cublas handle",
)


def ran_out(text: str) -> bool:
    """Whether a message says that memory ran out."""
    return any(mark in text.lower() for mark in _MARKS)


def may_have_run_out(text: str) -> bool:
    """Whether a message is one of CUDA's libraries that could not start.

    That is also what a broken installation looks like, so it means lack of memory only if the same program has worked
    with less.
    """
    return any(mark in text.lower() for mark in _MARKS_OF_LIBRARIES)
