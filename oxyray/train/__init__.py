"""Training: dense part in DeepSpeed, tables in TorchRec, joined in one step; checkpoints; the pre-training stage."""
