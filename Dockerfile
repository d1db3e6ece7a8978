# The README's first command on a CPU:
#     docker build -t fedkdx .
#     docker run --rm -v "$PWD/runs:/fedkdx/runs" fedkdx
# Any other flags take the place of that command's: docker run --rm fedkdx --list
FROM python:3.12-slim
# The C compiler is for the compiled operations, which make a round on a CPU faster.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch
WORKDIR /fedkdx
COPY . .
RUN pip install --no-cache-dir -e '.[report,spar]'
ENTRYPOINT ["python", "run.py"]
CMD ["-data", "SPAR", "-algo", "Local,FedAvg,FedAvgFT,FedFTL,kNN-Per,FedKD+,FedKDX,FedKDX+", "--preset", "tuned", "--train-fraction", "0.25", "-m", "cnn", "-jr", "0.4", "-gr", "60"]
