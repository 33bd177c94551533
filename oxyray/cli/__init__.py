"""The command line: `oxyray STAGE [key=value ...]`. Hydra ends here; behind it there are only checked dataclasses."""
