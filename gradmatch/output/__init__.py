"""What a merge writes: a folder that appears whole or not at all, its checks, its report and its card."""
