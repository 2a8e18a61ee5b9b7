# shellcheck shell=bash
# What differs between sites, and nothing else. Every line to look at is marked SITE.
# Sourced by the job scripts of this folder, once on the first node of the job.

# SITE: the Python that has spectral-scale installed, on a file system that all nodes see.
: "${SPECTRAL_SCALE_PYTHON:=.venv/bin/python}"

# SITE: software modules, where the cluster has them.
# module purge && module load cuda/12.8 openmpi

# SITE: the interface between nodes, if the default route is not it (`ip -brief address` on a node).
# It is given to gloo and NCCL alike; InfiniBand itself is found by NCCL without a name.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME='=ib0'

# SITE: InfiniBand adapters that NCCL may use, if not all (`ibstat -l`).
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3

# SITE: local scratch for compiled kernels; the default, the home folder, is slow on many clusters.
# export TORCH_EXTENSIONS_DIR=/local/$USER/torch_extensions TRITON_CACHE_DIR=/local/$USER/triton

# Threads of one rank: its own cores, no more.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# A rank that waits for another notices within the run's own limits, not NCCL's ten minutes.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Datasets and tokenizers are local folders; nothing is fetched in the middle of a run.
export HF_HUB_OFFLINE=1
