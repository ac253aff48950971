# The server of a GPU machine. `gpupool-sync service --format compose` prints how to run it: it needs the host's lock
# directory, the NVIDIA runtime, and the secrets of `gpupool-sync serve --init`.
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY gpupool_sync gpupool_sync
RUN python -m venv /opt/gpupool-sync && /opt/gpupool-sync/bin/pip install --no-cache-dir '.[server]'

FROM python:3.12-slim
COPY --from=build /opt/gpupool-sync /opt/gpupool-sync
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=utility PYTHONUNBUFFERED=1
USER 65534:65534
EXPOSE 8000
ENTRYPOINT ["/opt/gpupool-sync/bin/gpupool-sync", "serve"]
CMD ["--host", "0.0.0.0"]
