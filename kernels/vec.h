/* A vector of neighbouring channels, as wide as the processor has them. */
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE void load(vec *v, const float *from) { memcpy(v, from, sizeof *v); }
INLINE void store(float *to, const vec *v) { memcpy(to, v, sizeof *v); }
