//! The kinds of guests, told apart by their images: the one place that names them all.

use super::linux::{self, LinuxPlan};
use super::plan::{Facts, Plan};
use super::shim::{self, ShimPlan};
use crate::boot::Image;
use crate::config::VmConfig;
use crate::elastic::{Shape, check_offers};
use crate::error::LaunchError;
use std::sync::Arc;

/// The facts about guests with this image, or with the built-in one.
#[must_use]
pub fn facts(image: Option<&Image>) -> &'static Facts {
    match image {
        Some(Image::Linux(_)) => &linux::FACTS,
        Some(Image::Own(_)) | None => &shim::FACTS,
    }
}

/// Checks a guest against its configuration, and the configuration against what the guest offers, and
/// opens the files and devices it needs.
///
/// # Errors
/// The first thing that does not fit.
pub fn plan<'a>(config: &'a VmConfig, image: &'a Arc<Image>) -> Result<Box<dyn Plan + 'a>, LaunchError> {
    let way = config.elastic.way();
    check_offers(way, &facts(Some(image)).offers)?;
    let plan: Box<dyn Plan> = match &**image {
        Image::Own(kernel) => Box::new(ShimPlan::new(config, image, kernel)?),
        Image::Linux(kernel) => Box::new(LinuxPlan::new(config, kernel)?),
    };
    way.check(&Shape { backing: config.backing, map: &plan.address_map(), image: &plan.image() })?;
    Ok(plan)
}
