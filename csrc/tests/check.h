// Checks that do not vanish under -DNDEBUG as assert does.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);  \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (false)

#define CHECK_THROWS(expression, kind)                                                        \
  do {                                                                                        \
    bool thrown = false;                                                                      \
    try {                                                                                     \
      static_cast<void>(expression);                                                          \
    } catch (const kind&) {                                                                   \
      thrown = true;                                                                          \
    }                                                                                         \
    if (!thrown) {                                                                            \
      std::fprintf(stderr, "%s:%d: no %s from %s\n", __FILE__, __LINE__, #kind, #expression); \
      std::exit(1);                                                                           \
    }                                                                                         \
  } while (false)
