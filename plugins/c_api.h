/* The library as C sees it. The structs are kernels/params.h and kernels/tiles.h. */
#pragma once

#include "kernels/params.h"

#define ARROWHEAD_API __attribute__((visibility("default")))

extern "C" {

/* cudaError_t of kernels/launch.h and kernels/rows.h. `stream` is a cudaStream_t. */
ARROWHEAD_API int arrowhead_attention(const arrowhead::AttentionParams* params, void* stream);
ARROWHEAD_API int arrowhead_rms_norm(const arrowhead::RowParams* params, const void* weight,
                                     float epsilon, void* stream);
ARROWHEAD_API int arrowhead_rotary(const arrowhead::RowParams* params, const float* cos,
                                   const float* sin, void* stream);
ARROWHEAD_API const char* arrowhead_error_string(int error);
ARROWHEAD_API int arrowhead_params_size(void);
ARROWHEAD_API int arrowhead_workspace_bytes(void);
ARROWHEAD_API int arrowhead_max_heads(void);

/* Which build this is: the project's version; 16 hexadecimal digits that change with any source of
   the kernels, of this interface or of the TensorRT plugins; the compute capabilities it has code
   for ("80,86,90a"). */
ARROWHEAD_API const char* arrowhead_version(void);
ARROWHEAD_API const char* arrowhead_build_id(void);
ARROWHEAD_API const char* arrowhead_architectures(void);

/* Tile arithmetic, for tests and cost models; needs no device. Ranges are two ints. */
ARROWHEAD_API void arrowhead_arrow_kv_blocks(arrowhead::TokenLayout layout, int q_block,
                                             int half_window, int* range);
ARROWHEAD_API long long arrowhead_kept_pairs(arrowhead::TokenLayout layout, int mode,
                                             int text_queries);
/* Which (segment, tile) the rows compute, in order, and whether under a mask: three ints each.
   Returns their number; -1 if they are more than `capacity`. */
ARROWHEAD_API int arrowhead_kv_list(arrowhead::TokenLayout layout, int segment, int row_begin,
                                    int row_end, int mode, int tile_k, int* out, int capacity);
/* How rows own_begin .. own_end - 1 walk the list of a query tile: run, skip, run, skip; then
   whether each of their own tiles is masked. Returns the number of these, or -1 beyond capacity. */
ARROWHEAD_API int arrowhead_walk(arrowhead::TokenLayout layout, int segment, int row_begin,
                                 int row_end, int own_begin, int own_end, int mode, int tile_k,
                                 int* out, int capacity);
/* The keys of a segment that one row sees: first and one past the last. */
ARROWHEAD_API void arrowhead_visible_keys(arrowhead::TokenLayout layout, int row_segment,
                                          int key_segment, int row, int mode, int* range);
/* Every ticket of a launch in order: head, batch, segment, tile. Returns their number. */
ARROWHEAD_API int arrowhead_tickets(arrowhead::TokenLayout layout, int batch, int text_queries,
                                    int tile_q, int chunk, int heads,
                                    const arrowhead::HeadTask* tasks, int* out, int capacity);
}
