# syntax=docker/dockerfile:1
# Nested Runtime. docker build -t nested-runtime .                        on the CPU
#                 docker build -t nested-runtime:cuda --target cuda .     with CUDA's torch
# The RUN lines of the CPU image are replayed without an engine by `make test-container`.
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/nested
ENV PATH=/opt/nested/bin:$PATH

# torch first: a layer that changes only with the pin
FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install torch==2.13.0 --extra-index-url ${TORCH_INDEX}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY nested_runtime nested_runtime
COPY server server
COPY clients clients
# hadolint ignore=DL3013
RUN pip install '.[serve]'

FROM build AS build-cuda
RUN pip install torch==2.13.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY nested_runtime nested_runtime
COPY server server
COPY clients clients
# hadolint ignore=DL3013
RUN pip install '.[serve]'

# What both run in: nobody's user, and nothing writable but /data and /tmp, so the root file system can be read-only.
FROM python:3.11-slim-bookworm AS runtime
RUN useradd --uid 10001 --create-home --home-dir /home/nested nested \
    && install -d -o nested -g nested /data
ENV PATH=/opt/nested/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/tmp/numba TRITON_CACHE_DIR=/tmp/triton
WORKDIR /home/nested
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# Without an API key file the server refuses to listen beyond loopback: give --api-key-file, or --insecure behind a gateway.
ENTRYPOINT ["nested-serve", "--host", "0.0.0.0", "--port", "8000", "--data-dir", "/data"]
CMD ["--api-key-file", "/run/secrets/api_keys"]

FROM runtime AS cuda
# Triton builds a small launcher with the C compiler when a kernel first runs; its cache in /tmp must allow execution.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/nested /opt/nested
USER 10001

FROM runtime AS cpu
COPY --from=build-cpu /opt/nested /opt/nested
USER 10001
