# syntax=docker/dockerfile:1
# Nested Runtime on the CPU. Build: docker build -t nested-runtime .
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/nested
ENV PATH=/opt/nested/bin:$PATH
# torch first, from the index with CPU builds: a layer that changes only with the pin
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install torch==2.13.0 --extra-index-url ${TORCH_INDEX}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY nested_runtime nested_runtime
COPY server server
COPY clients clients
RUN pip install '.[serve]'

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /home/nested nested \
    && install -d -o nested -g nested /data
COPY --from=build /opt/nested /opt/nested
ENV PATH=/opt/nested/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NUMBA_CACHE_DIR=/tmp/numba
USER nested
WORKDIR /home/nested
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# Without an API key file the server refuses to listen beyond loopback: give --api-key-file, or --insecure behind a gateway.
ENTRYPOINT ["nested-serve", "--host", "0.0.0.0", "--port", "8000", "--data-dir", "/data"]
CMD ["--api-key-file", "/run/secrets/api_keys"]
