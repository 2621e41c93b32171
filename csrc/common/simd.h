// One source, three machine codes, chosen when the module is loaded: AVX-512, AVX2, baseline
// x86-64. Mark plain functions only: lambdas and templates can be merged by the linker and lose
// their clones.
#pragma once
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HICO_SIMD [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define HICO_SIMD
#endif
