# shellcheck shell=bash
# The settings that differ between sites. Every line to review is marked SITE.
# The job scripts of this folder source this file once, on the first node of the job.

# SITE: the Python that has spectral-scale installed, on a file system shared by all nodes.
: "${SPECTRAL_SCALE_PYTHON:=.venv/bin/python}"

# SITE: software modules, if the cluster uses them.
# module purge && module load cuda/12.8 openmpi

# SITE: the network interface between nodes, if it is not the default route (`ip -brief address`).
# Both gloo and NCCL use it; NCCL finds InfiniBand itself without a name.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME='=ib0'

# SITE: the InfiniBand adapters that NCCL may use, if not all of them (`ibstat -l`).
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3

# SITE: local scratch for compiled kernels; the home folder, the default, is slow on many clusters.
# export TORCH_EXTENSIONS_DIR=/local/$USER/torch_extensions TRITON_CACHE_DIR=/local/$USER/triton

# Threads per rank: no more than its own cores.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# How long ranks wait for one another is set by the run itself: the watchdog ends it within
# health.hang_timeout_seconds of silence and names the rank; torch's collectives wait longer, so that it
# speaks first. NCCL's variables need no values: TORCH_NCCL_ASYNC_ERROR_HANDLING decides how a process
# ends after a timeout, not when, and torch's default, to end it at once, is right.
# Data sets and tokenizers are local folders; nothing is downloaded during a run.
export HF_HUB_OFFLINE=1
