"""What is worth knowing on one CUDA GPU, in parts that run one after another: `bash benchmarks/gpu/run.sh`."""
