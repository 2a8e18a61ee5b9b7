"""Layers of the Lorentz model of hyperbolic space (Chen et al. 2022, HyboNet), in plain torch.

Their matrices are ordinary `nn.Linear`, held by the layers, so that `spectral_scale.convert` and
the other methods take them as they take those of any model.
"""

from spectral_scale.hyperbolic.graph import ClassPoints as ClassPoints
from spectral_scale.hyperbolic.graph import LorentzGraphLayer as LorentzGraphLayer
from spectral_scale.hyperbolic.graph import link_loss as link_loss
from spectral_scale.hyperbolic.graph import link_scores as link_scores
from spectral_scale.hyperbolic.graph import node_loss as node_loss
from spectral_scale.hyperbolic.linear import LorentzLinear as LorentzLinear
from spectral_scale.hyperbolic.points import centroid as centroid
from spectral_scale.hyperbolic.points import exp_at_origin as exp_at_origin
from spectral_scale.hyperbolic.points import lift as lift
from spectral_scale.hyperbolic.points import minkowski as minkowski
from spectral_scale.hyperbolic.points import minkowski_pairs as minkowski_pairs
from spectral_scale.hyperbolic.translation import LorentzTransformer as LorentzTransformer
