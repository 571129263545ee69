// A chunk of video in memory, [B, C, T, H, W], dense in one of the two orders that PyTorch knows.
#pragma once

#include <cstdint>

namespace cogvx {

struct Video {
  char* data;
  int64_t batch, channels, frames, pixels;  // pixels of a frame, H * W
  bool channels_last;                       // a pixel's channels side by side, else a channel's pixels
};

template <class T>
static inline T* at(const Video& video, int64_t b, int64_t channel, int64_t frame, int64_t pixel) {
  const int64_t index = video.channels_last
                            ? ((b * video.frames + frame) * video.pixels + pixel) * video.channels + channel
                            : ((b * video.channels + channel) * video.frames + frame) * video.pixels + pixel;
  return reinterpret_cast<T*>(video.data) + index;
}

}  // namespace cogvx
