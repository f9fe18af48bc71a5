// In what type memory holds features.
#pragma once

namespace sslk {

enum class FeatureType { kFloat32, kBFloat16, kFloat16 };

}  // namespace sslk
