"""Where blocks are kept: host memory and disk, behind one small port."""
