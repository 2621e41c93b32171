// Which tokens went into which position.
#pragma once
#include <cstdint>
#include <vector>

namespace hico {

// order [t]: the tokens sorted by position, in token order within one; first [k + 1]: where each
// position begins.
void list_members(const int32_t* assignment, int64_t t, int64_t k, int32_t* order, int32_t* first);

}  // namespace hico
