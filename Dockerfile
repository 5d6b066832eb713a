# The image of docs/launch.md: this checkout in /wavelet_jax, installed with one of its extras.
#
#     docker build --build-arg EXTRA=tpu --tag REGISTRY/wavelet-jax:latest .
#
# EXTRA is tpu, cuda (whose wheels bring the CUDA libraries: the host needs NVIDIA's driver and container toolkit), or
# empty for CPUs.
ARG PYTHON=3.13
FROM python:${PYTHON}-slim-trixie

ARG EXTRA=
ENV PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /wavelet_jax

# The dependencies first: they change less often than the code, and their layer is then kept.
COPY pyproject.toml README.md LICENSE ./
COPY wavelet_jax/__init__.py wavelet_jax/version.py wavelet_jax/
RUN pip install --no-cache-dir --editable ".${EXTRA:+[$EXTRA]}"

COPY . .
RUN python -c "import wavelet_jax; wavelet_jax.get_config('wavelet')"

# `docker stop` and Kubernetes send SIGTERM to the process itself: it saves and exits with 143.
ENTRYPOINT ["python"]
CMD ["train.py"]
