"""Differential privacy of hospitals or patients: who takes part, what is clipped, what is added, what it costs."""

from capsfl.privacy.accounting import epsilon_report as epsilon_report
from capsfl.privacy.accounting import epsilon_under_both_relations as epsilon_under_both_relations
from capsfl.privacy.calibration import solve as solve
from capsfl.privacy.clipping import clip_by_global_norm as clip_by_global_norm
from capsfl.privacy.events import PrivacyError as PrivacyError
from capsfl.privacy.mechanisms import add_gaussian as add_gaussian
from capsfl.privacy.mechanisms import mean_with_noise as mean_with_noise
from capsfl.privacy.plan import PrivacyConfig as PrivacyConfig
from capsfl.privacy.plan import PrivacyPlan as PrivacyPlan
from capsfl.privacy.plan import PrivacyStatement as PrivacyStatement
from capsfl.privacy.plan import noise_for as noise_for
from capsfl.privacy.sampling import Cohort as Cohort
