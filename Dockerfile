# docker build --tag lssl .                        with torch for CPUs; for CUDA 13.0, 13.2 or 12.6:
# docker build --tag lssl --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# docker run --rm --volume "$PWD:/work" lssl fit --config demo        (CUDA: --gpus all; workers: --shm-size 8g)
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/lssl
COPY constraints.txt .
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt .
WORKDIR /work
ENTRYPOINT ["lssl"]
CMD ["--help"]
