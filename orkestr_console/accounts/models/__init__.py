"""Everything the accounts app keeps, in one name space."""

from __future__ import annotations

from orkestr_console.accounts.models.people import (
    Invitation,
    Membership,
    Role,
    SignedIn,
    Team,
    User,
    UserManager,
    new_invitation_id,
    new_team_id,
)
from orkestr_console.accounts.models.plans import MAX_BUILD_SECONDS, Agreement, Plan, TeamLimits
from orkestr_console.accounts.models.records import AuditEntry, Metric, Outcome, UsageDay
from orkestr_console.accounts.models.tokens import (
    ApiToken,
    DeviceLogin,
    KeyedCall,
    RateBucket,
    TokenOrigin,
    new_device_login_id,
    new_token_id,
)

__all__ = [
    "MAX_BUILD_SECONDS",
    "Agreement",
    "ApiToken",
    "AuditEntry",
    "DeviceLogin",
    "Invitation",
    "KeyedCall",
    "Membership",
    "Metric",
    "Outcome",
    "Plan",
    "RateBucket",
    "Role",
    "SignedIn",
    "Team",
    "TeamLimits",
    "TokenOrigin",
    "UsageDay",
    "User",
    "UserManager",
    "new_device_login_id",
    "new_invitation_id",
    "new_team_id",
    "new_token_id",
]
