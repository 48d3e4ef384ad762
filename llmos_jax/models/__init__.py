"""Networks: one file per family on shared layers, attention and stack. Files with `Config` and `build` are families."""
