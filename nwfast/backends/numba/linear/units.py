"""Compiled entry points of the fast Gauss transform; all else is compiled into them, and they are cached on disk."""

from ..base import DIGEST
from . import boxes, far_rows, key_kernels
from . import near_rows as numba_fgt_rows

cut = boxes.compile_cut(DIGEST)
choose = boxes.compile_choose(DIGEST)
box_series = boxes.compile_series(DIGEST)
moments = boxes.compile_moments(DIGEST)
near_rows = numba_fgt_rows.compile_rows(DIGEST)
careful_rows = far_rows.compile_careful(DIGEST)
crowds = far_rows.compile_crowds(DIGEST)
near_keys = key_kernels.compile_near_keys(DIGEST)
key_windows = key_kernels.compile_key_windows(DIGEST)
careful_keys = key_kernels.compile_careful_keys(DIGEST)
box_keys = key_kernels.compile_box_keys(DIGEST)
