"""The policy: instruction-conditioned encoder-decoder that generates semantic IDs. Plain torch: no Ray, DeepSpeed or TorchRec is needed to
use it."""
