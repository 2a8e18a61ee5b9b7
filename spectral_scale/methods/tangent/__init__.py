"""The tangent form of SST: factors that train from zero beside fixed orthonormal bases."""
