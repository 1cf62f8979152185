"""Compiled entry points of the fast Gauss transform; all else is compiled into them, and they are cached on disk."""

from . import numba_fgt_boxes, numba_fgt_careful, numba_fgt_keys, numba_fgt_rows
from .numba_math import DIGEST

cut = numba_fgt_boxes.compile_cut(DIGEST)
choose = numba_fgt_boxes.compile_choose(DIGEST)
box_series = numba_fgt_boxes.compile_series(DIGEST)
moments = numba_fgt_boxes.compile_moments(DIGEST)
near_rows = numba_fgt_rows.compile_rows(DIGEST)
careful_rows = numba_fgt_careful.compile_careful(DIGEST)
crowds = numba_fgt_careful.compile_crowds(DIGEST)
near_keys = numba_fgt_keys.compile_near_keys(DIGEST)
key_windows = numba_fgt_keys.compile_key_windows(DIGEST)
careful_keys = numba_fgt_keys.compile_careful_keys(DIGEST)
box_keys = numba_fgt_keys.compile_box_keys(DIGEST)
