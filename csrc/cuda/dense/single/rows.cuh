// Sums over keys for one feature and channel in float32: declarations; see single/rows.cu.

#pragma once

#include "common.cuh"

namespace nwfast {

// Which sums a row gets beside the total and the value: for no derivative, for that by w, for those by w and the query.
enum class OffsetSums { kNone, kSquares, kAll };

// Sums of a row, in this order; with fewer of them the first 2 or 4.
enum RowSum { kTotal, kValue, kSquare, kSquareValue, kOffset, kOffsetValue, kRowSums };

struct RowPlan {
  OffsetSums offset_sums;
  int sums;              // of RowSum
  int64_t block_rows;    // rows of one block
  int64_t query_blocks;  // blocks of one batch element and part
  int64_t parts;         // of the keys, summed by blocks of their own and added in order
};

RowPlan plan_rows(const Problem& problem, int multiprocessors, OffsetSums offset_sums);

// partial: (*B, parts, sums, M).
void launch_row_sums(const Problem& problem, const Device& device, const RowPlan& plan, const Survey* surveys,
                     float* partial);

}  // namespace nwfast
