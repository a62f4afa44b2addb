// Finds the frames in what every rank sent, and checks them; layout: wire.py. No vectors, so no levels.
#pragma once

#include "crc32.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace hc {

constexpr size_t FRAME_HEADER = 32;   // bytes before the checksum
constexpr size_t FRAME_PAYLOAD = 36;  // where the payload starts
constexpr uint8_t FRAME_DENSE = 1, FRAME_NON_FINITE = 2;

// Whether a header says what `expected` does of all that is the same on all ranks, and names this sender.
inline bool frame_agrees(const uint8_t* header, const uint8_t* expected, size_t sender) {
    const uint8_t flags = header[5];
    const bool flagged = flags == 0 || flags == FRAME_DENSE || flags == FRAME_NON_FINITE;
    const size_t named = header[6] | static_cast<size_t>(header[7]) << 8;
    return flagged && named == (sender & 0xffff) && std::memcmp(header, expected, 5) == 0 &&
           std::memcmp(header + 8, expected + 8, 16) == 0;
}

// Puts the payload's offset, its length and the frame's flags of each of `count` frames in a buffer; returns how many
// frames are as `expected`, a header for each, says and undamaged. All are, and fill the buffer, if it is `count`.
template <class Crc>
size_t find_frames(
    const uint8_t* buffer, size_t length, size_t sender, const uint8_t* expected, size_t count, Crc crc,
    int64_t* offsets, int64_t* lengths, uint8_t* flags) {
    size_t at = 0;
    for (size_t i = 0; i < count; i++, expected += FRAME_HEADER) {
        const uint8_t* header = buffer + at;
        if (length - at < FRAME_PAYLOAD || !frame_agrees(header, expected, sender)) {
            return i;
        }
        uint64_t payload;
        uint32_t checksum;
        std::memcpy(&payload, header + 24, 8);
        std::memcpy(&checksum, header + FRAME_HEADER, 4);
        const size_t left = length - at - FRAME_PAYLOAD;
        if (payload > left || (payload + 3) / 4 * 4 > left || (header[5] == FRAME_NON_FINITE && payload)) {
            return i;
        }
        const size_t end = FRAME_PAYLOAD + payload, whole = FRAME_PAYLOAD + (payload + 3) / 4 * 4;
        if (crc(crc(0, header, FRAME_HEADER), header + FRAME_PAYLOAD, payload) != checksum) {
            return i;
        }
        for (size_t p = end; p < whole; p++) {
            if (header[p]) {
                return i;
            }
        }
        offsets[i] = static_cast<int64_t>(at + FRAME_PAYLOAD);
        lengths[i] = static_cast<int64_t>(payload);
        flags[i] = header[5];
        at += whole;
    }
    return at == length ? count : count - 1;
}

}  // namespace hc
