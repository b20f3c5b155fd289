// The kernel bodies: what one thread of one block does, as functions of (arguments, block, thread).
//
// launch.cu runs them over a grid on a GPU, host_run.cpp over the same grid on the host, so that index arithmetic,
// vector accesses, tails and the look-up of rows run in tests without a GPU. Everything that rounds comes from adam.h
// and formats.h. All indices of elements and blocks are 64-bit.
#pragma once

#include "adam.cuh"
#include "convert.cuh"
#include "sums.cuh"
