#pragma once
#include <map>
#include <span>
#include <string>

#include "io/safetensors.h"
#include "merge/average.h"
#include "merge/average_sink.h"
#include "merge/input_hashes.h"

namespace kiln {

/// Hands the weighted average of every item of `sink` to it, from the sources of its name. Threads take pieces of at
/// most `piece_elements` and write each into place, so that reading, computing and writing overlap. Memory is a part of
/// a piece of output for each thread, and about 100 MiB of inputs mapped. `hashes` gets what it follows; null: nothing.
/// A data Error when an average is not finite (fail_not_finite), a resource Error when the disk is full.
void write_averages(AverageSink& sink, const std::map<std::string, Sources>& sources, std::span<const double> weights,
                    std::size_t piece_elements, InputHashes* hashes);

}  // namespace kiln
